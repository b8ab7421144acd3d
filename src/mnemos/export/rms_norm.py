"""nn.RMSNorm in operators that every tracer knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.export.forwards import parts_of, replaced


@contextmanager
def spelled_out(module: nn.Module) -> Iterator[None]:
    """Inside, the module's nn.RMSNorm layers compute with a mean and a square root; afterwards as before."""
    kind = getattr(nn, "RMSNorm", None)
    layers = [] if kind is None else parts_of(module, kind)
    with replaced({layer: _forward(layer) for layer in layers}):
        yield


def _forward(layer: Any) -> Any:
    axes = tuple(range(-len(layer.normalized_shape), 0))
    epsilon = layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps

    def forward(x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + epsilon)
        result: Tensor = scaled if layer.weight is None else scaled * layer.weight
        return result

    return forward
