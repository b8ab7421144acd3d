"""PyTorch's attention over tensors of two or three axes as one over four, which is what ONNX's converter takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class FourAxes(TorchFunctionMode):
    """Inside, scaled_dot_product_attention gets (batch, heads, time, size) from callers that give fewer axes."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **named)
        named |= zip(_PARAMETERS, args, strict=False)
        axes = named["query"].dim()
        if axes not in (2, 3):
            return function(*args, **(kwargs or {}))
        for name in _PARAMETERS[:4]:
            if isinstance(named.get(name), Tensor):
                named[name] = _with_heads(named[name], axes)
        mixed = function(named.pop("query"), named.pop("key"), named.pop("value"), **named)
        return mixed.squeeze(1) if axes == 3 else mixed.squeeze(0).squeeze(0)


def _with_heads(tensor: Tensor, axes: int) -> Tensor:
    """(time, size) or (batch, time, size) with one head; a mask (time, time) is that of every batch already."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return tensor[None, None] if axes == 2 else tensor
