"""How far apart logits are, and how far those of the same text may be."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def difference(one: Tensor, other: Tensor) -> float:
    """The greatest difference between two tensors of logits; the same infinity in both is none."""
    return float(torch.where(one == other, 0.0, (one - other).abs()).max())


def tolerance(module: nn.Module, logits: Tensor) -> float:
    """How far apart two computations of the same logits may be: rounding of their dtype, scaled by their size."""
    finite = logits.float()
    size = float(finite[finite.isfinite()].abs().max())
    if _is_quantized(module):
        return 8e-2 * size
    return {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2}.get(logits.dtype, 8e-2) * size


def _is_quantized(module: nn.Module) -> bool:
    """Whether layers round their inputs by the range of all together, so that each depends a little on the others."""
    return any(type(m).__module__.startswith("torch.ao.nn.quantized.dynamic") for m in module.modules())
