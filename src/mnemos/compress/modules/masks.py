"""Which weights of a matrix are set to zero, and what the others become to make up for them.

By weights alone, the smallest go. With the inputs' moments, the rest is fitted anew: the matrix with the wanted zeros
whose products differ least, found by ADMM while the share of zeros grows (Boža, "Fast and Effective Weight Update for
Pruned Large Language Models", 2024). The criterion there, a weight's size times that of its input, is Wanda's (Sun et
al., "A Simple and Effective Pruning Approach for Large Language Models", 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemos.compress.modules.moments import Moments
from mnemos.errors import ConfigError, shown

ITERATIONS = 30
RAMP = 20  # iterations in which the share of zeros grows to what is wanted
DAMPING = 0.01  # added to the moments' diagonal, in shares of its mean


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere (1 x 1), in whole blocks, or so many of every `group` weights of a row.

    rows, columns  of a block
    kept, group    at most `kept` weights of every `group` consecutive ones of a row stay; 0: no such rule
    """

    rows: int = 1
    columns: int = 1
    kept: int = 0
    group: int = 0

    @classmethod
    def read(cls, text: str | None) -> Pattern:
        """From "2:4" (two of every four stay), "4x8" (blocks of 4 rows and 8 columns), or None."""
        if text is None:
            return cls()
        numbers = re.fullmatch(r"(\d{1,4})([:x])(\d{1,4})", text) if isinstance(text, str) else None
        if numbers is not None:
            first, kind, second = int(numbers[1]), numbers[2], int(numbers[3])
            if kind == "x" and first and second:
                return cls(first, second)
            if kind == ":" and 0 < first < second:
                return cls(kept=first, group=second)
        raise ConfigError(
            f"pattern is {shown(text)}; it must be None, N:M with N below M such as 2:4, or ROWSxCOLUMNS such as 4x8"
        )

    @property
    def zeros(self) -> float | None:
        """The share of zeros that N:M makes, whatever ratio is wanted; None of the others, which follow the ratio."""
        return 1 - self.kept / self.group if self.group else None

    def fits(self, shape: torch.Size) -> bool:
        """Whether a matrix (rows, columns) divides into such blocks or groups."""
        return shape[0] % self.rows == 0 and shape[1] % self.columns == 0 and shape[1] % (self.group or 1) == 0

    def scores(self, values: Tensor) -> Tensor:
        """The importance (rows, columns) of what is kept or removed together, from that of each weight."""
        if self.rows == self.columns == 1:
            return values
        return F.avg_pool2d(values[None], (self.rows, self.columns))[0]

    def spread(self, kept: Tensor) -> Tensor:
        """A mask of blocks as one of weights."""
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def mask(self, values: Tensor, ratio: float, share: float = 1.0) -> Tensor:
        """Which weights stay, (rows, columns) bool, by the importance of each; `ratio` of them go.

        share: only this share of those that would go do, the least important ones.
        """
        if self.group:
            groups = values.reshape(len(values), -1, self.group)
            order = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
            gone = (order >= self.kept).flatten(1)
            if share < 1:
                count = round(share * int(gone.sum()))
                gone &= lowest(torch.where(gone, values, torch.inf), count)
            return gone.logical_not()
        scores = self.scores(values)
        return self.spread(~lowest(scores, round(share * ratio * scores.numel())))


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of some scores, as a mask of their shape; exactly that many, of equal ones the first."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    gone = flat < limit
    equal = (flat == limit).nonzero()[:, 0]
    gone[equal[: count - int(gone.sum())]] = True
    return gone.view_as(scores)


def magnitude_masks(
    weights: Mapping[str, Tensor], ratio: float, pattern: Pattern, *, together: bool
) -> dict[str, Tensor]:
    """The masks of matrices by the size of their weights alone; `together`: one threshold for all of them."""
    if not together or pattern.group:
        return {name: pattern.mask(weight.float().square(), ratio) for name, weight in weights.items()}
    scores = {name: pattern.scores(weight.float().square()) for name, weight in weights.items()}
    everything = torch.cat([score.flatten().cpu() for score in scores.values()])
    gone = lowest(everything, round(ratio * everything.numel()))
    parts = torch.split(gone, [score.numel() for score in scores.values()])
    return {
        name: pattern.spread(~part.view_as(score).to(score.device))
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def fit_sparse(weight: Tensor, moments: Tensor, ratio: float, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(weights, mask), both (rows, columns): `ratio` of them zero, and the others such that products change least.

    weight (rows, columns) float32; moments (columns, columns): the inputs' second moments, or their covariance where a
    bias makes up for the mean.
    """
    scale = moments.diagonal().clamp_min(1e-8 * float(moments.diagonal().mean()) + 1e-30).sqrt()
    inputs = moments / scale / scale[:, None]
    inputs.diagonal().add_(DAMPING * float(inputs.diagonal().mean()))
    scaled = weight * scale
    target = scaled @ inputs
    inputs.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs))
    dual, mask = torch.zeros_like(scaled), torch.ones_like(scaled, dtype=torch.bool)
    for iteration in range(ITERATIONS):
        proposed = scaled + dual
        if iteration < RAMP:
            mask = pattern.mask(proposed.square(), ratio, 1 - (1 - (iteration + 1) / RAMP) ** 3)
        sparse = proposed * mask
        dual = proposed - sparse
        scaled = (target + sparse - dual) @ inverse
    return (scaled + dual) * mask / scale, mask


def fit_masked(
    weight: Tensor, moments: Moments, ratio: float, pattern: Pattern, *, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, mask, what is added to the bias) of a layer whose inputs have these moments; see `fit_sparse`."""
    fitted, mask = fit_sparse(weight, moments.covariance() if has_bias else moments.second, ratio, pattern)
    return fitted, mask, (weight - fitted) @ moments.mean
