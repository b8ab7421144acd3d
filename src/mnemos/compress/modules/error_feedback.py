"""Rounding that knows what a layer reads: a column's error is made up for by the columns that are not rounded yet.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): with H, the second moments of a layer's inputs, the square error of its
outputs is e H e^T for an error e of a row of weights. Columns are rounded one after the other, and each one's error is
distributed to the later ones by the Cholesky factor of H's inverse. Scales and minima are fitted block by block to what
the weights have become. Blocks of zeros stay zero: what they are to make up for, the columns after them do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnemos.compress.modules.block_weights import BLOCK, BlockWeights, Grid, in_blocks

_DAMPING = 0.01  # of H's mean diagonal, added to it: the sample says nothing certain about some directions


def quantize_for(weight: Tensor, moments: Tensor, bits: int) -> BlockWeights:
    """Rounds a matrix (rows, columns) to `bits` so that its products keep their values.

    moments (columns, columns): the mean of x x^T over the layer's inputs x.
    """
    blocks = in_blocks(weight)
    count = blocks.shape[1]
    moments = _damped(moments, count * BLOCK)
    grid = Grid.of(blocks, bits, moments.diagonal().view(count, BLOCK))
    factor = _factor(moments)
    stays = (blocks != 0).any(2).T.float()  # (blocks, rows)
    left = blocks.flatten(1).T.contiguous()  # (columns, rows): a column's values side by side
    codes = torch.empty_like(left)
    for begin in range(0, len(left), BLOCK):
        end = begin + BLOCK
        own, inner = left[begin:end], factor[begin:end, begin:end]
        diagonal = inner.diagonal()
        grid.refit(begin // BLOCK, (own * stays[begin // BLOCK]).T, diagonal.square().reciprocal())
        step, low = grid.of_block(begin // BLOCK)
        per_step = 1 / torch.where(step == 0, 1, step)
        errors = torch.empty_like(own)
        for column, scale in enumerate(diagonal.tolist()):
            code = torch.sub(own[column], low, out=codes[begin + column])
            code.mul_(per_step).round_().clamp_(*grid.limits)
            error = torch.addcmul(low, code, step).sub_(own[column]).div_(-scale)
            errors[column] = error
            own[column + 1 :].addr_(inner[column, column + 1 :], error, alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return grid.filled(codes.T.reshape(blocks.shape), weight.shape[1])


def _damped(moments: Tensor, size: int) -> Tensor:
    """Positive definite; columns that were added to fill the last block are independent of others."""
    columns = len(moments)
    full = torch.zeros(size, size)
    full[:columns, :columns] = moments
    level = float(moments.diagonal().mean()) or 1.0
    full.diagonal().add_(_DAMPING * level)
    return full


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(moments.to(dtype))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                break
    factor: Tensor = upper.float()
    return factor
