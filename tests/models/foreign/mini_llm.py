"""A Transformer in the form of the Mini-LLM document: Llama with neighbouring rotary pairs and past_kv per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    dim: int = 48
    n_layers: int = 3
    n_heads: int = 6
    n_kv_heads: int = 3
    vocab_size: int = 61
    max_seq_len: int = 128


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = args.n_heads, args.n_kv_heads, args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.size, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.size, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, past: Any) -> tuple[Tensor, Any]:
        batch, time, width = x.shape
        q = rotate(self.wq(x).view(batch, time, self.heads, self.size), rotation)
        k = rotate(self.wk(x).view(batch, time, self.kv_heads, self.size), rotation)
        v = self.wv(x).view(batch, time, self.kv_heads, self.size)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        mask = torch.arange(k.shape[1])[None, :] <= torch.arange(k.shape[1] - time, k.shape[1])[:, None]
        heads = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(batch, time, width)), (k, v)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[None, :, None, :]).flatten(3)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(dim, 4 * dim, bias=False)
        self.w2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(args), Norm(args.dim)
        self.feed_forward, self.ffn_norm = FeedForward(args.dim), Norm(args.dim)

    def forward(self, x: Tensor, rotation: Tensor, past: Any) -> tuple[Tensor, Any]:
        attended, present = self.attention(self.attention_norm(x), rotation, past)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x)), present


class TokenEmbedding(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.emb = nn.Embedding(args.vocab_size, args.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.emb(tokens)


class Transformer(nn.Module):
    """model(x, use_cache=True, past_kv=past_kv) -> logits, past_kv."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = TokenEmbedding(args)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layers))
        self.norm = Norm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.emb.weight
        size = args.dim // args.n_heads
        angles = torch.outer(torch.arange(args.max_seq_len).float(), 10000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: Tensor, use_cache: bool = False, past_kv: Any = None) -> tuple[Tensor, Any]:
        start = past_kv[0][0].shape[1] if past_kv else 0
        x, present = self.tok_embeddings(tokens), []
        for index, layer in enumerate(self.layers):
            rotation = self.freqs_cis[start : start + tokens.shape[1]]
            x, pair = layer(x, rotation, past_kv[index] if past_kv else None)
            present.append(pair)
        return self.output(self.norm(x)), present if use_cache else None


def make_transformer(args: ModelArgs | None = None, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(args or ModelArgs()).eval()
