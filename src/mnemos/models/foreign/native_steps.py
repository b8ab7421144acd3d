"""What the native core does for a foreign module in calls of few tokens: products, and in float32 attention and norms.

A step of one token reads all weights once and computes next to nothing, so what counts is how fast they are read, and
what each of PyTorch's small operations costs beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.formats.tensor_types import TensorType
from mnemos.machine.levels import settle_levels
from mnemos.native import core as _native

MOST_ROWS = 8
Multiply = Callable[[Tensor], Tensor]


class NativeOperators:
    """Operators of one module on tensors of at most MOST_ROWS rows; the native core learns in which order they come."""

    def __init__(self, threads: int) -> None:
        self._pool = _native.shared_pool(min(threads, _native.usable_cores()))
        settle_levels()
        self._step = _native.ForeignStep(self._pool)
        self._unpacked: list[tuple[Any, Any, Any, bool]] = []

    @staticmethod
    def available() -> bool:
        return _native is not None

    def linear(self, weight: Tensor, bias: Tensor | None, number: int | None, many: Multiply) -> tuple[Multiply, int]:
        """x W^T + bias for x (..., columns), and its number; given one, it takes that product's place.

        All are float32 or all bfloat16, whose results are rounded once, from sums in float32. `many` computes for more
        than MOST_ROWS rows. It cannot be used before `finish`.
        """
        rows, columns = weight.shape
        stored = weight.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
        kind = TensorType.BF16 if weight.dtype is torch.bfloat16 else TensorType.F32
        matrix = _native.allocate_matrix(
            stored, int(kind), rows, columns, as_float32=False, order=None, skip_zeros=True
        )
        self._unpacked.append((matrix, stored, None, False))
        offset = None if bias is None else bias.detach().float().contiguous().numpy()
        if number is None:
            number = self._step.add(matrix, offset)
        else:
            self._step.replace(number, matrix, offset)
        own, multiply, empty_like, dtype = number, self._step.multiply, torch.empty_like, weight.dtype
        # The shape of the last input of few rows, how many, and what a result for it looks like: empty_like is faster
        # than empty, and what happens for each layer of each token is worth little time.
        known: torch.Size | None = None
        count, like = 0, torch.empty(0)

        def multiply_rows(input: Tensor) -> Tensor:
            nonlocal known, count, like
            if input.dtype is not dtype or not input.is_cpu:
                return F.linear(input, weight, bias)  # which knows what it can make of that, or what to say
            shape = input.shape
            if shape != known:
                if shape[-1:] != (columns,):
                    return F.linear(input, weight, bias)
                fitting = input.numel() // columns
                if not 0 < fitting <= MOST_ROWS:
                    return many(input)
                like = input.new_empty((*shape[:-1], rows))  # whatever PyTorch's default type and device are
                known, count = shape, fitting
            x = input if input.is_contiguous() else input.contiguous()
            y = empty_like(like)
            multiply(own, x.data_ptr(), count, y.data_ptr())
            return y

        return multiply_rows, number

    def finish(self) -> None:
        """Copies the weights of all products made since the last time, into one piece of memory."""
        if self._unpacked:
            _native.pack_matrices(self._unpacked, self._pool)
            self._unpacked = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """torch's scaled_dot_product_attention of one query a sequence that sees all keys; None for any other."""
        asked, held = query.shape, key.shape
        if attn_mask is not None or dropout_p or is_causal or len(asked) != 4 or len(held) != 4 or asked[2] != 1:
            return None
        batch, heads, _, head_dim = asked
        _, kv_heads, count, _ = held
        steps, key_steps, value_steps = query.stride(), key.stride(), value.stride()
        fits = (
            held == value.shape
            and held[0] == batch <= MOST_ROWS
            and held[3] == head_dim
            and (heads == kv_heads or (enable_gqa and kv_heads and heads % kv_heads == 0))
            and count > 0
            and query.dtype is key.dtype is value.dtype is torch.float32
            and steps[3] == 1
            and key_steps[2:] == value_steps[2:] == (head_dim, 1)  # those of a head side by side
            and query.is_cpu
        )
        if not fits:
            return None
        y = query.new_empty((batch, heads, 1, head_dim))
        self._step.attend(
            (batch, heads, kv_heads, count, head_dim),
            (query.data_ptr(), steps[0], steps[1]),
            (key.data_ptr(), key_steps[0], key_steps[1]),
            (value.data_ptr(), value_steps[0], value_steps[1]),
            head_dim**-0.5 if scale is None else scale,
            y.data_ptr(),
        )
        return y


def copy_position(new: Tensor, target: tuple[int, int, int]) -> bool:
    """Writes one position, (batch, heads, 1, width), to where it belongs; False: it is not of that kind.

    target: the address of the first head's position, and the steps, in floats, between batches and between heads; the
    values of a head are side by side. All is float32 on a CPU.
    """
    shape = new.shape
    if len(shape) != 4 or shape[2] != 1 or new.dtype is not torch.float32 or not new.is_cpu:
        return False
    source = new.stride()
    if source[3] != 1:
        return False
    _native.copy_heads(shape[0], shape[1], shape[3], (new.data_ptr(), source[0], source[1]), target)
    return True


def rms_norm(layer: nn.RMSNorm) -> Multiply:
    """The forward of an nn.RMSNorm over the last axis."""
    parameters, shape = layer._parameters, layer.normalized_shape
    width, own = max(1, shape[-1]), layer.__dict__
    norm, float32, smallest = _native.rms_norm, torch.float32, torch.finfo(torch.float32).eps
    empty_like = torch.empty_like

    def forward(x: Tensor) -> Tensor:
        weight, epsilon = parameters["weight"], own["eps"]
        rows = x.numel() // width
        if (
            type(x) is not Tensor
            or weight is None
            or x.dtype is not float32
            or weight.dtype is not float32
            or not (x.is_cpu and weight.is_cpu and x.is_contiguous() and weight.is_contiguous())
            or x.shape[-1:] != shape
            or not 0 < rows <= MOST_ROWS
        ):
            return F.rms_norm(x, shape, weight, epsilon)
        y = empty_like(x)
        e = smallest if epsilon is None else epsilon
        norm(x.data_ptr(), weight.data_ptr(), e, y.data_ptr(), rows, width)
        return y

    return forward


def takes_rms_norm(layer: nn.Module) -> bool:
    """Whether `rms_norm` can stand in for the layer: exactly nn.RMSNorm over one axis, with nothing patched."""
    plain = type(layer) is nn.RMSNorm and "forward" not in layer.__dict__
    return plain and len(cast(nn.RMSNorm, layer).normalized_shape) == 1 and "weight" in layer._parameters
