"""Weights in 8, 5 or 4 bits: codes in blocks of 32 columns, and two small numbers a block.

A value is `scale * code + minimum` (8 bits: `scale * code`, with signed codes). As in ggml's k-quants, scales and
minima have two levels: a byte for each block and a number for each row. The file holds these, 4.5, 5.5 or 8.25 bits a
weight and the rows' numbers; the native products take the same codes with the scales multiplied out, as Q4_1, Q5_1 or
Q8_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mnemos.formats.tensor_types import TensorType

BLOCK = 32
TYPES = {8: TensorType.Q8_0, 5: TensorType.Q5_1, 4: TensorType.Q4_1}
LEAST_ZEROS = 1 / 8  # of all blocks: from this share on, blocks of zeros are left out
_SMALLEST = 2.0**-24  # float16's
_SLACK = 1.1  # of the rows' largest scales: error feedback changes the weights of a row while it is quantized
_SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72)  # of a block's range, from which fits begin
_ROUNDS = 3
_CHUNK = 1 << 19  # values fitted at a time: what they need stays in the caches


@dataclass
class BlockWeights:
    """A matrix (rows, columns) in blocks; its columns are padded with zeros to whole ones.

    codes (rows, blocks, 4 * bits) uint8, a block's as its GGUF type stores them, or `compact` (stored, 4 * bits): only
    those of blocks that are not zero; scales (rows, blocks) uint8; minima (rows, blocks) int8; row_scales and
    row_minima (rows,) bfloat16. Without minima (8 bits) both are None.
    """

    bits: int
    columns: int
    codes: Tensor
    scales: Tensor
    row_scales: Tensor
    minima: Tensor | None = None
    row_minima: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.row_scales)

    @property
    def bytes(self) -> int:
        """Memory of the tensors, which is what a file takes."""
        return sum(part.nbytes for part in self._parts if part is not None)

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.codes, self.scales, self.row_scales, self.minima, self.row_minima

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BlockWeights:
        """The same with each of its tensors changed."""
        changed: list[Any] = [None if part is None else change(part) for part in self._parts]
        return BlockWeights(self.bits, self.columns, *changed)

    def has_values(self) -> Tensor:
        """(rows, blocks) bool: whether a block's scale or minimum is other than zero."""
        return self.scales != 0 if self.minima is None else (self.scales != 0) | (self.minima != 0)

    def compact(self) -> BlockWeights:
        """Without the codes of blocks that are zero, if they are an eighth of all or more; else as it is."""
        stored = self.has_values()
        if self.codes.dim() == 2 or int(stored.sum()) > stored.numel() * (1 - LEAST_ZEROS):
            return self
        return replace(self, codes=self.codes[stored])

    def whole_codes(self) -> Tensor:
        """(rows, blocks, 4 * bits) uint8."""
        if self.codes.dim() == 3:
            return self.codes
        whole = self.codes.new_zeros((*self.scales.shape, self.codes.shape[1]))
        whole[self.has_values()] = self.codes
        return whole

    def block_scales(self) -> Tensor:
        """(rows, blocks) float16."""
        return (self.row_scales.float()[:, None] * self.scales).half()

    def block_minima(self) -> Tensor:
        """(rows, blocks) float16. Only with minima."""
        assert self.minima is not None and self.row_minima is not None
        return (self.row_minima.float()[:, None] * self.minima).half()

    def gguf_blocks(self) -> Tensor:
        """The rows as TYPES[bits] stores them, flat uint8."""
        parts = [self.block_scales()[..., None].view(torch.uint8)]
        if self.minima is not None:
            parts.append(self.block_minima()[..., None].view(torch.uint8))
        return torch.cat((*parts, self.whole_codes()), dim=2).flatten()

    def values(self) -> Tensor:
        """(rows, columns) float32: what the products multiply by."""
        codes = unpack(self.whole_codes(), self.bits)
        values = codes * self.block_scales().float()[..., None]
        if self.minima is not None:
            values += self.block_minima().float()[..., None]
        return values.flatten(1)[:, : self.columns].contiguous()


def quantize(weight: Tensor, bits: int, importance: Tensor | None = None) -> BlockWeights:
    """Rounds a matrix (rows, columns) to `bits` without data, or with the mean square of each column's input.

    With 4 and 5 bits each block's scale and minimum are fitted by least squares, from several beginnings, to codes that
    are rounded again after each fit.
    """
    blocks = in_blocks(weight)
    weights = None if importance is None else in_blocks(importance[None])[0]
    grid = Grid.of(blocks, bits, weights)
    codes = torch.cat([grid.part(at).round(part) for at, part in _chunks(blocks)])
    return grid.filled(codes, weight.shape[1])


@dataclass
class Grid:
    """The values that each block of a matrix can have: its scale and minimum, rounded as they are stored.

    step, low (rows, blocks, 1) float32; scales, row_scales, minima, row_minima as in BlockWeights.
    """

    bits: int
    step: Tensor
    low: Tensor
    scales: Tensor
    row_scales: Tensor
    minima: Tensor | None
    row_minima: Tensor | None

    @staticmethod
    def of(blocks: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
        """The best grid for blocks (rows, blocks, BLOCK), with the importance (blocks, BLOCK) of their columns."""
        if bits == 8:
            step = blocks.abs().amax(2) / 127
            row_scales = (step.amax(1) * _SLACK / 255).bfloat16()
            scales = torch.ceil(step / _nonzero(row_scales.float())[:, None]).clamp(
                0, 255
            )  # so that nothing is cut off
            return Grid._stored(bits, scales, row_scales, None, None)
        fits = [_fit(part, bits, importance) for _, part in _chunks(blocks)]
        step, low = (torch.cat(parts) for parts in zip(*fits, strict=True))
        row_scales = (step.amax(1) * _SLACK / 255).bfloat16()
        row_minima = (low.abs().amax(1) * _SLACK / 127).bfloat16()
        grid = Grid._stored(bits, *_rounded(step, low, row_scales, row_minima))
        # With the scales rounded, the minima are fitted again.
        codes = torch.cat([grid.part(at).round(part) for at, part in _chunks(blocks)])
        low = _mean(blocks - codes * grid.step, importance)[..., 0]
        return Grid._stored(bits, *_rounded(step, low, row_scales, row_minima))

    @staticmethod
    def _stored(
        bits: int, scales: Tensor, row_scales: Tensor, minima: Tensor | None, row_minima: Tensor | None
    ) -> Grid:
        step = (row_scales.float()[:, None] * scales).half().float()[..., None]
        if minima is None or row_minima is None:
            return Grid(bits, step, torch.zeros(()), scales.byte(), row_scales, None, None)
        low = (row_minima.float()[:, None] * minima).half().float()[..., None]
        return Grid(bits, step, low, scales.byte(), row_scales, minima.char(), row_minima)

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest code."""
        return (-127, 127) if self.bits == 8 else (0, (1 << self.bits) - 1)

    def part(self, rows: slice) -> Grid:
        """The grid of some rows, for `round` only."""
        low = self.low[rows] if self.low.dim() else self.low
        return Grid(self.bits, self.step[rows], low, self.scales, self.row_scales, None, None)

    def round(self, blocks: Tensor) -> Tensor:
        """The nearest codes of blocks (rows, blocks, BLOCK), as float32."""
        return ((blocks - self.low) / _nonzero(self.step)).round_().clamp_(*self.limits)

    def refit(self, block: int, values: Tensor, importance: Tensor) -> None:
        """Fits one block's scale and minimum to other values (rows, BLOCK), of importance (BLOCK,)."""
        if self.minima is None or self.row_minima is None:
            step = values.abs().amax(1) / 127
            self.scales[:, block] = torch.ceil(step / _nonzero(self.row_scales.float())).clamp(0, 255).byte()
        else:
            step, low = (part[:, 0] for part in _fit(values[:, None], self.bits, importance[None]))
            scales, _, minima, _ = _rounded(step[:, None], low[:, None], self.row_scales, self.row_minima)
            self.scales[:, block], self.minima[:, block] = scales[:, 0].byte(), minima[:, 0].char()
            self.low[:, block, 0] = (self.row_minima.float() * minima[:, 0]).half().float()
        self.step[:, block, 0] = (self.row_scales.float() * self.scales[:, block]).half().float()

    def of_block(self, block: int) -> tuple[Tensor, Tensor]:
        """A block's scales and minima, (rows,) each."""
        step = self.step[:, block, 0].contiguous()
        return step, self.low[:, block, 0].contiguous() if self.low.dim() else torch.zeros_like(step)

    def filled(self, codes: Tensor, columns: int) -> BlockWeights:
        """With codes (rows, blocks, BLOCK)."""
        packed = pack(codes, self.bits)
        return BlockWeights(self.bits, columns, packed, self.scales, self.row_scales, self.minima, self.row_minima)


def in_blocks(matrix: Tensor) -> Tensor:
    """(rows, columns) as float32 (rows, blocks, BLOCK), padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.detach().float(), (0, -columns % BLOCK))
    return padded.reshape(rows, -1, BLOCK)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, blocks, BLOCK) as GGUF stores them: (rows, blocks, 4 * bits) uint8."""
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    whole = codes.to(torch.uint8)
    nibbles = (whole[..., :16] & 15) | (whole[..., 16:] & 15) << 4
    if bits == 4:
        return nibbles
    places = 1 << torch.arange(8, dtype=torch.uint8, device=whole.device)
    high = ((whole >> 4).view(*whole.shape[:2], 4, 8) * places).sum(3, dtype=torch.uint8)
    return torch.cat((high, nibbles), dim=2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, as float32."""
    if bits == 8:
        return packed.view(torch.int8).float()
    nibbles = packed[..., -16:]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=2)
    if bits == 5:
        high = packed[..., :4, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes = codes | high.flatten(2) << 4
    return codes.float()


def _fit(blocks: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and minimum (rows, blocks) with the least (weighted) square error that alternating fits find."""
    most = (1 << bits) - 1
    x = blocks.permute(2, 0, 1).contiguous()  # sums over the first axis are fast
    share = None if importance is None else (importance / _nonzero(importance.sum(1, keepdim=True))).T[:, None]

    def mean(values: Tensor) -> Tensor:
        return values.mean(0) if share is None else (values * share).sum(0)

    low, high = x.amin(0), x.amax(0)
    middle, half = (high + low) / 2, (high - low) / 2
    centre = mean(x)
    centred = x - centre
    variance = mean(centred.square())
    best_error = torch.full_like(low, torch.inf)
    best_step, best_low = half * 2 / most, low
    for shrink in _SHRINKS:
        start, step = middle - half * shrink, half * (2 * shrink / most)
        for _ in range(_ROUNDS):
            codes = x.sub(start).div_(_nonzero(step)).round_().clamp_(0, most)
            middle_code = mean(codes)
            codes -= middle_code
            slope = mean(codes * centred)
            step = slope / _nonzero(mean(codes.square_()))
            start = centre - step * middle_code
            error = variance - slope * step  # of the best line through these codes
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step, best_low = torch.where(better, step, best_step), torch.where(better, start, best_low)
    return best_step.clamp_(min=0), best_low


def _rounded(
    step: Tensor, low: Tensor, row_scales: Tensor, row_minima: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = (step / _nonzero(row_scales.float())[:, None]).round().clamp(0, 255)
    minima = (low / _nonzero(row_minima.float())[:, None]).round().clamp(-127, 127)
    return scales, row_scales, minima, row_minima


def _mean(values: Tensor, importance: Tensor | None) -> Tensor:
    """Of each block, (rows, blocks, 1)."""
    if importance is None:
        return values.mean(2, keepdim=True)
    return (values * importance).sum(2, keepdim=True) / _nonzero(importance.sum(1))[:, None]


def _nonzero(values: Tensor) -> Tensor:
    """With ones in place of zeros, to divide by."""
    return torch.where(values == 0, 1, values)


def _chunks(blocks: Tensor) -> list[tuple[slice, Tensor]]:
    """Some rows at a time."""
    rows = max(1, _CHUNK // max(1, blocks[0].numel()))
    return [(slice(at, at + rows), blocks[at : at + rows]) for at in range(0, len(blocks), rows)]
