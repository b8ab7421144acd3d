"""nn.MultiheadAttention with its products in layers of their own, so that they can be quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def takes_attention(module: nn.MultiheadAttention) -> bool:
    """Whether `PlainAttention` can stand in for it: exactly nn.MultiheadAttention, without added keys."""
    plain = type(module) is nn.MultiheadAttention and "forward" not in module.__dict__
    return plain and module.bias_k is None and module.bias_v is None and not module.add_zero_attn


class PlainAttention(nn.Module):
    """Computes what an nn.MultiheadAttention does in evaluation mode, with q_proj, k_proj, v_proj and out_proj."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.batch_first, self.dropout = source.batch_first, source.dropout
        # nn.TransformerEncoder and its layers ask for these, and then do not read the weights past this module.
        self._qkv_same_embed_dim, self.in_proj_bias = False, None
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.detach().chunk(3)
        else:
            weights = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, whose axes these are; True in a mask hides."""
        alone = query.dim() == 2
        if alone:
            query, key, value = (x[None] if self.batch_first else x[:, None] for x in (query, key, value))
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(one) for one in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if alone else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        return y.squeeze(0 if self.batch_first else 1) if alone else y, weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """What is added to the scores (batch, heads, queries, keys)."""
        added: Tensor | None = None
        if mask is not None:
            given = _additive(mask, q.dtype)
            added = given.view(-1, self.num_heads, *given.shape[1:]) if given.dim() == 3 else given
        if padding is not None:
            hidden = _additive(padding, q.dtype)
            hidden = (hidden[None] if hidden.dim() == 1 else hidden)[:, None, None]
            added = hidden if added is None else added + hidden
        return added


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    made: nn.Linear = layer
    return made


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
