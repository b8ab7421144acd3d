"""Small causal PyTorch modules that keep their cache inside themselves, in the styles that people write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.foreign.foreign_modules import CONTEXT, HEADS, WIDTH, Base, causal_mask

HEAD = WIDTH // HEADS


class Attention(nn.Module):
    """Norms, projections and an MLP; what is kept of keys and values (batch, heads, time, HEAD) is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class Blocks(Base):
    """A language model of such attention."""

    kind: type[Attention] = Attention

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(self.kind() for _ in self.layers)
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))


class MetaAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.cache_k, self.cache_v = torch.zeros(2, 2, CONTEXT, HEADS, HEAD)  # for 2 sequences, and no buffers

    def forward(self, x: Tensor, start: int, mask: Tensor | None) -> Tensor:
        q, k, v = self.heads(x)
        batch, end = len(x), start + x.shape[1]
        self.cache_k[:batch, start:end] = k.transpose(1, 2)
        self.cache_v[:batch, start:end] = v.transpose(1, 2)
        k, v = (cache[:batch, :end].transpose(1, 2) for cache in (self.cache_k, self.cache_v))
        return self.attend(x, q, k, v, mask)


class MetaLlama(Blocks):
    """forward(tokens, start_pos), with a cache in each attention that every call writes to."""

    kind = MetaAttention

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        x, time = self.embed(tokens, start_pos), tokens.shape[1]
        mask = causal_mask(time, start_pos + time) if time > 1 else None
        for layer in self.layers:
            x = layer(x, start_pos, mask)
        return self.head(self.norm(x)).float()


class ScratchAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)
        self.ptr_current_pos = 0

    def forward(self, x: Tensor, use_cache: bool) -> Tensor:
        q, k, v = self.heads(x)
        start = 0
        if use_cache:
            if self.cache_k is None:
                self.cache_k, self.cache_v = k, v
            else:
                self.cache_k, self.cache_v = torch.cat((self.cache_k, k), 2), torch.cat((self.cache_v, v), 2)
            k, v = self.cache_k, self.cache_v
            start = self.ptr_current_pos
            self.ptr_current_pos += x.shape[1]
        else:
            self.ptr_current_pos = 0
        return self.attend(x, q, k, v, causal_mask(CONTEXT, CONTEXT)[start : start + x.shape[1], : k.shape[2]])


class FromScratch(Blocks):
    """As in LLMs-from-scratch: forward(in_idx, use_cache=False) and reset_kv_cache()."""

    kind = ScratchAttention

    def __init__(self) -> None:
        super().__init__()
        self.current_pos = 0

    def reset_kv_cache(self) -> None:
        for layer in self.layers:
            layer.cache_k = layer.cache_v = None
            layer.ptr_current_pos = 0
        self.current_pos = 0

    def forward(self, in_idx: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(in_idx, self.current_pos if use_cache else 0)
        if use_cache:
            self.current_pos += in_idx.shape[1]
        for layer in self.layers:
            x = layer(x, use_cache)
        return self.head(self.norm(x))


class Roomy(FromScratch):
    """Like FromScratch, with room for a few positions that is created in the first call and then slides."""

    ROOM = 16

    class Attention(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.cache_k: Any = None
            self.cache_v: Any = None
            self.ptr_cur = 0

        def forward(self, x: Tensor, use_cache: bool) -> Tensor:
            q, k, v = self.heads(x)
            batch, time, _ = x.shape
            if use_cache and time <= Roomy.ROOM:
                if self.cache_k is None or len(self.cache_k) != batch:
                    self.cache_k, self.cache_v = torch.zeros(2, batch, HEADS, Roomy.ROOM, HEAD)
                    self.ptr_cur = 0
                overflow = max(0, self.ptr_cur + time - Roomy.ROOM)
                self.cache_k, self.cache_v = self.cache_k.roll(-overflow, 2), self.cache_v.roll(-overflow, 2)
                self.ptr_cur -= overflow
                self.cache_k[:, :, self.ptr_cur : self.ptr_cur + time] = k
                self.cache_v[:, :, self.ptr_cur : self.ptr_cur + time] = v
                self.ptr_cur += time
                k, v = self.cache_k[:, :, : self.ptr_cur], self.cache_v[:, :, : self.ptr_cur]
            return self.attend(x, q, k, v, causal_mask(time, k.shape[2]))

    kind = Attention


class BufferCache(nn.Module):
    def __init__(self, batch: int, length: int) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, HEADS, length, HEAD), persistent=False)
        self.register_buffer("v_cache", torch.zeros(batch, HEADS, length, HEAD), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class PositionedAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.kv_cache: Any = None

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor | None) -> Tensor:
        q, k, v = self.heads(x)
        if input_pos is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        return self.attend(x, q, k, v, mask)


class GPTFast(Blocks):
    """forward(idx, input_pos) after setup_caches(max_batch_size, max_seq_length); the batch must have that size."""

    kind = PositionedAttention

    def __init__(self) -> None:
        super().__init__()
        self.max_batch_size = self.max_seq_length = -1
        self.causal_mask: Tensor | None = None

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        if self.max_seq_length >= max_seq_length and self.max_batch_size >= max_batch_size:
            return
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        for layer in self.layers:
            layer.kv_cache = BufferCache(max_batch_size, max_seq_length)
        self.causal_mask = causal_mask(max_seq_length, max_seq_length)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        assert self.causal_mask is not None, "Caches must be initialized first"
        x = self.embedding(idx) + self.position(input_pos)
        for layer in self.layers:
            x = layer(x, self.causal_mask[input_pos], input_pos)
        return self.head(self.norm(x))


class LitGPT(Blocks):
    """forward(idx, input_pos=None), with a cache only after set_kv_cache(batch_size, ...)."""

    kind = PositionedAttention

    def __init__(self) -> None:
        super().__init__()
        self.mask_cache: Tensor | None = None

    def set_kv_cache(
        self, batch_size: int, max_seq_length: int | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        for layer in self.layers:
            layer.kv_cache = BufferCache(batch_size, max_seq_length or CONTEXT)
        self.mask_cache = causal_mask(CONTEXT, max_seq_length or CONTEXT)

    def clear_kv_cache(self) -> None:
        self.mask_cache = None
        for layer in self.layers:
            layer.kv_cache = None

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        time = idx.shape[1]
        if input_pos is not None and self.mask_cache is None:
            raise TypeError("You need to call `gpt.set_kv_cache()`")
        mask = causal_mask(time, time) if input_pos is None or self.mask_cache is None else self.mask_cache[input_pos]
        x = self.embedding(idx) + self.position(torch.arange(time) if input_pos is None else input_pos)
        for layer in self.layers:
            x = layer(x, mask, input_pos)
        return self.head(self.norm(x))


class ByObject(Blocks):
    """forward(in_idx, cache=None): an object with get(layer) and update(layer, (keys, values)); it counts itself."""

    class Attention(Attention):
        def forward(self, x: Tensor, cache: Any, start: int) -> tuple[Tensor, Any]:
            q, k, v = self.heads(x)
            if cache is not None:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            mask = causal_mask(CONTEXT, CONTEXT)[start : start + x.shape[1], : k.shape[2]]
            return self.attend(x, q, k, v, mask), (k, v)

    kind = Attention

    def __init__(self) -> None:
        super().__init__()
        self.current_pos = 0

    def forward(self, in_idx: Tensor, cache: Any = None) -> Tensor:
        start = self.current_pos if cache is not None else 0
        if cache is not None:
            self.current_pos += in_idx.shape[1]
        else:
            self.current_pos = 0
        x = self.embed(in_idx, start)
        for index, layer in enumerate(self.layers):
            x, kept = layer(x, cache.get(index) if cache is not None else None, start)
            if cache is not None:
                cache.update(index, kept)
        return self.head(self.norm(x))


class Always(Blocks):
    """Keeps keys and values in its own list in every call, until it is reset."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        self.kept = []

    def forward(self, ids: Tensor) -> Tensor:
        old, new = self.kept, []
        x = self.embed(ids, old[0][0].shape[2] if old else 0)
        for index, layer in enumerate(self.layers):
            q, k, v = layer.heads(x)
            if old:
                k, v = torch.cat((old[index][0], k), 2), torch.cat((old[index][1], v), 2)
            new.append((k, v))
            x = layer.attend(x, q, k, v, causal_mask(ids.shape[1], k.shape[2]))
        self.kept = new
        return self.head(self.norm(x))


class Static(Blocks):
    """forward(input_ids, cache_position) over a StaticCache of transformers inside, as its exporters make it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, StaticCache

        config = LlamaConfig(
            hidden_size=WIDTH, num_hidden_layers=len(self.layers), num_attention_heads=HEADS, num_key_value_heads=HEADS
        )
        self.static_cache = StaticCache(config=config, max_cache_len=CONTEXT)

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position(cache_position)
        for index, layer in enumerate(self.layers):
            q, k, v = layer.heads(x)
            k, v = self.static_cache.update(k, v, index, {"cache_position": cache_position})
            x = layer.attend(x, q, k, v, causal_mask(CONTEXT, CONTEXT)[cache_position])
        return self.head(self.norm(x))


class Remembers(Base):
    """Stores its activations in each call but never reads them: not a cache."""

    def forward(self, ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(ids, 0)
        for layer in self.layers:
            x = layer(x, lambda k, v: (k, v))
            self.last = x
        return self.head(self.norm(x))
