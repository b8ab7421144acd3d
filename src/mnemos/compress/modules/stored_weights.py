"""Layers whose weights are kept in fewer bits and expanded in each call: small, and not fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.compress.modules.layers import place_of
from mnemos.errors import MissingDependencyError

_LARGEST = 448.0  # of float8_e4m3fn
_BNB_BLOCK = 256


class _Stored(nn.Module):
    """Buffers that keep their types, whatever the rest of the module is turned into; they move to devices."""

    def _apply(self, fn: Any, recurse: bool = True) -> _Stored:
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(place_of(fn, buffer.device)))
        return self


class Float8Weight(_Stored):
    """A matrix in float8 (4 bits of exponent, 3 of mantissa), each row with a power of two that its values share.

    values (rows, columns) float8_e4m3fn; exponents (rows,) int8. So they expand to float32 and bfloat16 exactly.
    """

    values: Tensor
    exponents: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().float()
        largest = matrix.abs().amax(1).clamp(min=1e-30)
        exponents = torch.ceil(torch.log2(largest / _LARGEST)).clamp(-126, 126)
        self.register_buffer("values", (matrix * torch.exp2(-exponents)[:, None]).to(torch.float8_e4m3fn))
        self.register_buffer("exponents", exponents.to(torch.int8))

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The matrix as the products take it."""
        return (self.values.float() * torch.exp2(self.exponents.float())[:, None]).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some of its rows, (..., columns)."""
        found = self.values.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return (found.float() * torch.exp2(self.exponents[index].float())[..., None]).to(dtype)


class BitsandbytesFloat8Weight(_Stored):
    """A matrix in bitsandbytes' 8-bit floating-point code, in blocks of 256 values with a float32 scale each."""

    codes: Tensor
    scales: Tensor
    table: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        functional = import_bitsandbytes().functional
        table = functional.create_fp8_map(True, 4, 3, 8).to(weight.device)
        codes, state = functional.quantize_blockwise(weight.detach().float(), code=table, blocksize=_BNB_BLOCK)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", state.absmax)
        self.register_buffer("table", table)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """The matrix as the products take it."""
        functional = import_bitsandbytes().functional
        values: Tensor = functional.dequantize_blockwise(
            self.codes, absmax=self.scales, code=self.table, blocksize=_BNB_BLOCK
        )
        return values.to(dtype)


class StoredLinear(nn.Module):
    """nn.Linear over a weight that is expanded in each call."""

    def __init__(self, stored: Float8Weight | BitsandbytesFloat8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.stored = stored
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.stored.expand(input.dtype), self.bias)


class StoredEmbedding(nn.Module):
    """nn.Embedding over a table in float8."""

    def __init__(self, stored: Float8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype

    @property
    def weight(self) -> Tensor:
        """The whole table."""
        return self.stored.expand(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.stored.rows(input, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> StoredEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # says why where it cannot be moved
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        return self


def import_bitsandbytes() -> Any:
    """The library. MissingDependencyError: it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes is not installed: pip install 'mnemos[bitsandbytes]'") from error
    return bitsandbytes
