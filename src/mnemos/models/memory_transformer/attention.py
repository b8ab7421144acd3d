"""Attention over memory: positions ask, a bank's vectors answer. No causality, no positions, no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.models.memory_transformer.config import Config, MemorySettings
from mnemos.models.memory_transformer.routing import Route


class MemoryAttention(nn.Module):
    """Grouped-query attention from hidden states to memory vectors.

    With a `reduced_dim` bank, all of it takes place at the bank's width; else the projections may be factored into a
    `down` and an `up` matrix.
    """

    def __init__(self, config: Config, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        memory = config.memory
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        width = config.bank_width(hidden)
        self.factored = memory.use_low_rank_projections and not memory.is_reduced
        shapes = {
            "q": (heads * head_dim, hidden),
            "k": (kv_heads * head_dim, width),
            "v": (kv_heads * head_dim, width),
            "o": (hidden, heads * head_dim),
        }
        for name, (rows, columns) in shapes.items():
            if self.factored:
                self.add_module(f"{name}_down", nn.Linear(columns, memory.projection_rank, bias=False))
                self.add_module(f"{name}_up", nn.Linear(memory.projection_rank, rows, bias=False))
            else:
                self.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))

    def project(self, name: str, x: Tensor) -> Tensor:
        """The projection q, k, v or o of x."""
        result: Tensor
        if self.factored:
            result = getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(x))
        else:
            result = getattr(self, f"{name}_proj")(x)
        return result

    @property
    def last(self) -> nn.Linear:
        """The matrix that the output comes from."""
        layer: nn.Linear = getattr(self, "o_up" if self.factored else "o_proj")
        return layer

    def queries(self, x: Tensor) -> Tensor:
        """(B, heads, T, head_dim)"""
        return self.project("q", x).view(*x.shape[:-1], self.heads, self.head_dim).transpose(1, 2)

    def answers(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., kv_heads, N, head_dim) of memory vectors (..., N, width)."""
        heads = (*memory.shape[:-1], self.kv_heads, self.head_dim)
        k, v = (self.project(name, memory).view(heads).transpose(-3, -2) for name in "kv")
        return k, v

    def output(self, mixed: Tensor) -> Tensor:
        """(B, T, hidden) from (B, heads, T, head_dim)."""
        return self.project("o", mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, T, hidden) attends to memory (N, width), or to its own text's (B, N, width), with one softmax."""
        k, v = self.answers(memory if memory.dim() == 3 else memory.expand(len(x), -1, -1))
        mixed = F.scaled_dot_product_attention(self.queries(x), k, v, enable_gqa=self.heads != self.kv_heads)
        return self.output(mixed)


def attend_to_chapters(
    attention: MemoryAttention, x: Tensor, memory: Tensor, route: Route, settings: MemorySettings
) -> tuple[Tensor, Route]:
    """Each text of x (B, T, hidden) attends to the chapters chosen for it, with one softmax over all of them.

    Shared chapters come first, with weight 1; routed ones have `routed_scaling_factor` times theirs; all are divided by
    the total, and multiply their chapters' vectors. Returned with the output: the chapters and weights as used.
    """
    route = with_shared(route, settings)
    chosen = memory.view(settings.num_chapters, -1, memory.shape[-1])[route.indices]  # (B, k, P, width)
    chosen = (normalized(chosen, settings) * route.weights[..., None, None].to(chosen.dtype)).flatten(1, 2)
    return attention(x, chosen), route


def with_shared(route: Route, settings: MemorySettings) -> Route:
    """The route (B, k) of a text's routed chapters, with the shared chapters before them."""
    shared = settings.num_shared_chapters
    if not shared:
        return route
    indices, weights = route.indices, route.weights * settings.routed_scaling_factor
    first = torch.arange(shared, device=indices.device).expand(len(indices), shared)
    weights = torch.cat((weights.new_ones(len(indices), shared), weights), dim=1)
    return Route(torch.cat((first, indices), dim=1), weights / weights.sum(1, keepdim=True), route.losses)


def attend_by_token(
    attention: MemoryAttention, x: Tensor, memory: Tensor, route: Route, settings: MemorySettings
) -> Tensor:
    """Each position of x (B, T, hidden) attends to the chapters of `route` (B, T, k) chosen for it.

    Every chapter has its own softmax; their results are added with the router's weights, times `routed_scaling_factor`,
    to what all shared chapters give together.
    """
    k, v = attention.answers(normalized(memory, settings))  # (kv_heads, N, head_dim)
    q = attention.queries(x)  # (B, heads, T, head_dim)
    grouped: dict[str, Any] = {"enable_gqa": attention.heads != attention.kv_heads}
    shared = settings.num_shared_chapters
    length = len(memory) // settings.num_chapters
    parts = torch.zeros_like(q)
    if shared:
        first_k, first_v = (side[None, :, : shared * length].expand(len(x), -1, -1, -1) for side in (k, v))
        parts = parts + F.scaled_dot_product_attention(q, first_k, first_v, **grouped)
    for chapter in torch.unique(route.indices).tolist():
        rows = slice(chapter * length, (chapter + 1) * length)
        text, position, place = torch.nonzero(route.indices == chapter, as_tuple=True)
        asked = q[text, :, position][None].transpose(1, 2)  # (1, heads, positions, head_dim)
        answer = F.scaled_dot_product_attention(asked, k[None, :, rows], v[None, :, rows], **grouped)
        share = settings.routed_scaling_factor * route.weights[text, position, place].to(answer.dtype)
        flat = parts.transpose(1, 2).index_put(
            (text, position), answer[0].transpose(0, 1) * share[:, None, None], accumulate=True
        )
        parts = flat.transpose(1, 2)
    return attention.output(parts)


def normalized(memory: Tensor, settings: MemorySettings) -> Tensor:
    """Memory vectors normalized each by itself, where the config wants that; see `MemorySettings.normalizes`."""
    if not settings.normalizes:
        return memory
    epsilon = settings.shared_routed_norm_eps
    if settings.shared_routed_norm_type == "rms":
        return memory * torch.rsqrt(memory.square().mean(-1, keepdim=True) + epsilon)
    return F.layer_norm(memory, memory.shape[-1:], eps=epsilon)
