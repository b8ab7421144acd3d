"""Weights of a quantized module on a GPU: the blocks of its file as torchao's tensors, for nn.functional.linear.

4 bits: the very codes of the blocks, for aten's int4 product (torchao's `Int4TilePackedTo4dTensor`), which rounds no
inputs. Its groups are as long as a block, and scale * (code - 8) + zero is the block's scale * code + minimum.

8 and 5 bits: int8 with one scale for each row (torchao's `Int8Tensor`), rounded from the blocks' values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemos.compress.modules.block_weights import BLOCK, BlockWeights, unpack
from mnemos.errors import ConfigError, MissingDependencyError

# Of PyTorch's int8 product: it refuses fewer rows, and other multiples of columns go through the CPU in torchao.
_FEWEST_ROWS, _MULTIPLE = 17, 8
# Of the int4 product as torchao calls it: inputs are filled up to so many columns, weights to so many rows.
_INT4_COLUMNS, _INT4_ROWS, _INT4_TILES = 1024, 8, 8
_INT4_MIDDLE = 8
_INT4_CAPABILITY = 8  # compute capability: Ampere and later


class Torchao(NamedTuple):
    """What is used of torchao."""

    int4: Any
    int8: Any
    per_row: Any
    rounding: Any


def import_torchao() -> Torchao:
    """MissingDependencyError: it is not installed, or too old."""
    try:
        from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise MissingDependencyError(
            "a quantized module on a GPU needs torchao 0.18 or later, which is missing or older here: pip install "
            "'mnemos[gpu]'"
        ) from error
    return Torchao(Int4TilePackedTo4dTensor, Int8Tensor, PerRow(), QuantizeTensorToInt8Kwargs)


def check_gpu(place: torch.device, bits: int) -> None:
    """Errors: MissingDependencyError without torchao; ConfigError for a GPU that has no int4 product."""
    import_torchao()
    major, minor = torch.cuda.get_device_capability(place)
    if bits == 4 and major < _INT4_CAPABILITY:
        raise ConfigError(
            f"{place} has compute capability {major}.{minor} and bits is 4, whose product needs "
            f"{_INT4_CAPABILITY}.0; expected bits=8, or the model on the CPU"
        )


def linear_weight(weights: BlockWeights, place: torch.device, rounds_inputs: bool) -> Tensor:
    """What `multiply` takes, (rows, columns).

    rounds_inputs: with 8 and 5 bits, each row of the inputs is rounded to int8 too, where the product takes its width.
    """
    if weights.bits == 4:
        return _int4(weights, place)
    torchao = import_torchao()
    values = weights.values().to(place)
    fits = not any(size % _MULTIPLE for size in values.shape)
    inputs = torchao.rounding(granularity=torchao.per_row) if rounds_inputs and fits else None
    made: Tensor = torchao.int8.from_hp(values, granularity=torchao.per_row, act_quant_kwargs=inputs)
    return made


def multiply(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x (..., columns) and a weight of `linear_weight`, in x's type."""
    count = x.numel() // x.shape[-1]
    if not count:  # torchao has no scale for no rows
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    if getattr(weight, "act_quant_kwargs", None) is None or count >= _FEWEST_ROWS:
        return F.linear(x, weight, bias)
    filled = F.pad(x.reshape(count, x.shape[-1]), (0, 0, 0, _FEWEST_ROWS - count))
    return F.linear(filled, weight, bias)[:count].reshape(*x.shape[:-1], weight.shape[0])


def int4_parts(weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """The operands of aten's int4 product before its own packing, from 4-bit blocks.

    codes (rows, columns / 2) uint8, two in a byte, the first one high; scales (columns / BLOCK, rows, 2) bfloat16: of
    each group its scale and its zero, where a value is scale * (code - 8) + zero. Rows and columns are filled up with
    zeros as torchao does.
    """
    rows, columns = weights.rows, weights.scales.shape[1] * BLOCK
    more = 0, -columns % _INT4_COLUMNS, 0, -rows % _INT4_ROWS
    codes = F.pad(unpack(weights.whole_codes(), 4).flatten(1).byte(), more)
    step, low = weights.block_scales().float(), weights.block_minima().float()
    more = 0, more[1] // BLOCK, 0, more[3]
    groups = torch.stack([F.pad(part, more) for part in (step, low + _INT4_MIDDLE * step)], dim=2)
    return codes[:, ::2] << 4 | codes[:, 1::2], groups.transpose(0, 1).contiguous().bfloat16()


def _int4(weights: BlockWeights, place: torch.device) -> Tensor:
    codes, scales = (part.to(place) for part in int4_parts(weights))
    packed = torch.ops.aten._convert_weight_to_int4pack(codes.contiguous(), _INT4_TILES)
    shape = torch.Size((weights.rows, weights.columns))
    made: Tensor = import_torchao().int4(packed, scales, [1, BLOCK], shape)
    return made


def on_device(weights: BlockWeights, place: torch.device) -> BlockWeights:
    """A table's blocks on a device, all of them, so that rows can be picked by their numbers."""
    return replace(weights, codes=weights.whole_codes()).mapped(lambda part: part.to(place))


def pick_rows(table: BlockWeights, ids: Tensor) -> Tensor:
    """Rows (..., columns) float32 of a table of `on_device` by their numbers (...)."""
    flat = ids.reshape(-1)
    return table.mapped(lambda part: part[flat]).values().view(*ids.shape, table.columns)
