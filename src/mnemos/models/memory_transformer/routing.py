"""Which chapters of a bank are read: a router's choice, and the pooling of states that it chooses by.

The strategies, from the whole call to the single position (T positions, window W):

sequence          the mean of the call's positions
sequence-rolling  the mean over all positions t of the mean of the last W up to t
rolling           the mean of the last W positions of the text, across cached calls
hybrid            the mean of the whole prompt, then as rolling
token             every position by itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mnemos.errors import ConfigError

SMALLEST_SUM = 1e-12
SPARE_POSITIONS = 64  # that a text's window keeps beyond those that are averaged: it may return by so many


@dataclass
class Route:
    """Chapters and their weights: (B, k), or (B, T, k) for `token`. `losses` by name; empty if none were wanted."""

    indices: Tensor
    weights: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


def choose(logits: Tensor, top_k: int, excluded: int = 0) -> tuple[Tensor, Tensor]:
    """(indices, weights) of the most probable chapters along the last axis, counted from chapter `excluded` on.

    Weights are softmax probabilities divided by their sum; of equally probable chapters the lower number comes first.
    """
    routed = logits.float().softmax(-1)[..., excluded:]
    routed = routed / routed.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    weights, indices = routed.sort(dim=-1, descending=True, stable=True)
    count = min(top_k, routed.shape[-1])
    weights, indices = weights[..., :count], indices[..., :count]
    return indices, weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)


def router_losses(logits: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """What keeps a router from collapsing, from its logits (..., C) and the chapters chosen (..., k).

    load_balance   C * sum over c of (selections of c per row) * (mean probability of c);
                   Fedus et al. 2021, arXiv:2101.03961
    auxiliary      the mean over c of (mean squared probability of c - 1 / C) squared
    z_loss         the mean of logsumexp(logits) squared; Zoph et al. 2022, arXiv:2202.08906
    entropy        the mean entropy, to watch
    """
    chapters = logits.shape[-1]
    logits = logits.float().reshape(-1, chapters)
    p = logits.softmax(-1)
    chosen = indices.reshape(len(logits), -1)
    counts = torch.bincount(chosen.flatten(), minlength=chapters).to(p.dtype) / len(p)
    return {
        "load_balance": chapters * (counts * p.mean(0)).sum(),
        "auxiliary": (p.square().mean(0) - 1 / chapters).square().mean(),
        "z_loss": logits.logsumexp(-1).square().mean(),
        "entropy": -(p * p.clamp_min(SMALLEST_SUM).log()).sum(-1).mean(),
    }


def total_router_loss(losses: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """The weighted sum of the losses that have a coefficient."""
    return torch.stack([factor * losses[name] for name, factor in coefficients.items()]).sum()


class ChapterRouter(nn.Module):
    """A linear router (C, H) and the choice of `top_k` chapters."""

    def __init__(self, hidden: int, chapters: int, top_k: int, routing_strategy: str = "sequence") -> None:
        super().__init__()
        if not 0 < top_k <= chapters:
            raise ConfigError(f"top_k is {top_k}; it must be from 1 to the {chapters} chapters")
        self.router = nn.Linear(hidden, chapters)
        self.top_k = top_k
        self.routing_strategy = routing_strategy

    @property
    def num_chapters(self) -> int:
        """C."""
        return self.router.out_features

    def forward(
        self,
        hidden_states: Tensor,
        return_losses: bool = False,
        exclude_prefix_chapters: int = 0,
        rolling_window_size: int = 128,
    ) -> Route:
        """One set of chapters for each text of (B, T, H), by the mean of its positions, or of their rolling means."""
        if self.routing_strategy == "sequence-rolling":
            pooled = rolling_mean(hidden_states, rolling_window_size)
        else:
            pooled = hidden_states.mean(1)
        return self.route(pooled, return_losses, exclude_prefix_chapters)

    def route_token_level(
        self, hidden_states: Tensor, return_losses: bool = False, exclude_prefix_chapters: int = 0
    ) -> Route:
        """A set of chapters for each position of (B, T, H)."""
        return self.route(hidden_states, return_losses, exclude_prefix_chapters)

    def route(self, states: Tensor, return_losses: bool = False, exclude_prefix_chapters: int = 0) -> Route:
        """The choice for states (..., H). Indices count all chapters, and the first ones are never chosen."""
        weight = getattr(self.router, "weight", None)  # quantized ones may have none
        logits = self.router(states if weight is None else states.to(weight.dtype))
        indices, weights = choose(logits, self.top_k, exclude_prefix_chapters)
        indices = indices + exclude_prefix_chapters
        return Route(indices, weights, router_losses(logits, indices) if return_losses else {})


def rolling_mean(states: Tensor, window: int) -> Tensor:
    """The mean over t of the means of positions max(0, t - window + 1) to t of states (B, T, H)."""
    positions = states.shape[1]
    width = torch.arange(1, positions + 1, device=states.device).clamp_max(window)
    # Position i is in the windows that end at i to i + window - 1, each of which divides by its own length.
    parts = torch.cat((torch.zeros(1, device=states.device), (1 / width).cumsum(0)))
    ends = (torch.arange(positions, device=states.device) + window).clamp_max(positions)
    shares = (parts[ends] - parts[:-1]) / positions
    return torch.einsum("bth,t->bh", states, shares.to(states.dtype))


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of states (B, n, H) over the positions that the last n columns of a mask (B, S) show; 1: shown."""
    if mask is None:
        return states.mean(1)
    shown = mask[:, -states.shape[1] :].to(states.dtype)[..., None]
    return (states * shown).sum(1) / shown.sum(1).clamp_min(1)


def pool(
    strategy: str,
    states: Tensor,
    window: int,
    *,
    cached: bool,
    held: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(what a router chooses by (B, H), the states that the text's window then holds) for a call's states (B, T, H).

    held: the window's states after the text's earlier calls, None in its first one. cached: the call belongs to a text
    whose keys and values are kept; without that, rolling and hybrid are sequence and there is no window.
    """
    if strategy == "sequence-rolling":
        return rolling_mean(states, window), None
    if strategy == "sequence" or not cached:
        return states.mean(1), None
    kept = (states if held is None else torch.cat((held, states), dim=1))[:, -window - SPARE_POSITIONS :].detach()
    recent = kept[:, -window:]
    if strategy == "hybrid" and held is None:
        return masked_mean(states, mask), kept
    return masked_mean(recent, mask), kept
