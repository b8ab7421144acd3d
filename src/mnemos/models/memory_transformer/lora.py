"""Low-rank additions to linear layers. Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) * B (A x); parameters `weight`, `bias`, `lora_A` (rank, in), `lora_B` (out, rank).

    Once merged, its state dict is that of the linear layer: W holds the addition, and the factors are not saved, which
    would add it again where they are loaded.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        like: dict[str, Any] = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in)."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            return y
        return y + self.scaling * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the product of the factors to the weight, once."""
        if not self.merged:
            self.weight.copy_(self.merged_weight())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes it out again."""
        if self.merged:
            self.weight -= self._addition()
            self.merged = False

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with the product of the factors added."""
        return self.weight.detach().clone() if self.merged else self.weight + self._addition()

    def _addition(self) -> Tensor:
        return (self.scaling * (self.lora_B.float() @ self.lora_A.float())).to(self.weight.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in ("lora_A", "lora_B"):
                destination.pop(prefix + name)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Merged weights, which come without factors, are taken as they are: nothing is added to them any more."""
        factors = {prefix + "lora_A", prefix + "lora_B"}
        merged = prefix + "weight" in state_dict and factors.isdisjoint(state_dict)
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, unexpected_keys, error_msgs)
        missing_keys += [name for name in own if not (merged and name in factors)]
        if merged:
            nn.init.zeros_(self.lora_B)
            self.merged = False


def apply_lora(module: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> list[str]:
    """Replaces the linear layers whose path contains one of `targets`; returns their paths."""
    chosen = [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(target in path for target in targets)
    ]
    for path, layer in chosen:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, LoRALinear(layer, rank, alpha, dropout))
    return [path for path, _ in chosen]


def lora_layers(module: nn.Module) -> Iterator[LoRALinear]:
    """All layers with low-rank additions."""
    return (layer for layer in module.modules() if isinstance(layer, LoRALinear))


def merge_lora(module: nn.Module) -> None:
    """Merges the additions of all layers into their weights."""
    for layer in lora_layers(module):
        layer.merge()


def unmerge_lora(module: nn.Module) -> None:
    """Takes them out of the weights of all merged layers."""
    for layer in lora_layers(module):
        layer.unmerge()
