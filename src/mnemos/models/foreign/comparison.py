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
    rounding = max((_rounding(member) for member in module.modules()), default=0.0)
    if rounding:
        return rounding * size
    return {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2}.get(logits.dtype, 8e-2) * size


def _rounding(module: nn.Module) -> float:
    """How far apart the same inputs may come out of a layer that rounds them: 0 for one that does not.

    PyTorch's own quantized layers round by the range of all inputs together, so that each depends a little on the
    others. A layer that rounds each row by itself has `rounds_inputs`: what differs in an input's last bits may be
    rounded the other way.
    """
    if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
        return 0.12
    return 3e-2 if getattr(module, "rounds_inputs", False) else 0.0
