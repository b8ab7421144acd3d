"""Partial sorting of a row's values, largest first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats

Indices = npt.NDArray[np.intp]
_FIRST_CANDIDATES = 256


def largest(values: Floats, size: int) -> Indices:
    """The indices of the `size` largest values, in descending order, ties by ascending index."""
    if size < len(values):
        smallest = np.partition(values, len(values) - size)[len(values) - size]
        above = np.flatnonzero(values > smallest)
        ids = np.concatenate([above, np.flatnonzero(values == smallest)[: size - len(above)]])
    else:
        ids = np.arange(len(values))
    return ids[descending(values[ids])]


def covering(keys: Floats, weights: Floats, reach: float, first: int) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Indices in descending order of their keys, until their weights sum to more than `reach`, and the running sums.

    `first` is how many are tried first. All are returned if the sum never exceeds `reach`.
    """
    size = first
    while True:
        ids = largest(keys, min(size, len(keys)))
        cumulative = np.cumsum(weights[ids], dtype=np.float64)
        if cumulative[-1] > reach or size >= len(keys):
            return ids, cumulative
        size *= 8


def nucleus(weights: Floats, top_p: float, keep: int = 1) -> tuple[Indices, npt.NDArray[np.float64]]:
    """The fewest most probable tokens with `top_p` of the weights' sum, at least `keep`, and the running sums.

    Tokens are in descending order, ties by ascending index, without those of weight 0. Holtzman et al. 2019,
    arXiv:1904.09751.
    """
    reach = nucleus_share(top_p) * float(weights.sum(dtype=np.float64))
    ids, cumulative = covering(weights, weights, reach, max(_FIRST_CANDIDATES, keep))
    size = max(int(np.searchsorted(cumulative, reach, side="left")) + 1, keep)
    size = min(size, int(np.count_nonzero(weights[ids])))
    return ids[:size], cumulative[:size]


def nucleus_share(top_p: float) -> float:
    """The share of the sum that a nucleus has to reach to end where Hugging Face's does.

    There a token is left out if it and all less probable ones sum to at most 1 - top_p, compared in float32. Where sums
    are equal in decimal (0.5 + 0.3 and top_p 0.8), rounding in float64 must not decide.
    """
    rest = np.float32(1 - top_p)
    return 1 - (float(rest) + float(np.nextafter(rest, np.float32(2)))) / 2


def descending(values: Floats) -> Indices:
    """The stable order of descending values; much faster than NumPy's own stable argsort.

    Each value and its index are packed into one integer, because sorting integers is vectorised.
    """
    bits = (0.0 - values).view(np.uint32)  # 0.0 - value is never minus zero, which would differ in its bits
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    packed = ascending << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    packed.sort()
    return np.asarray(packed & np.uint64(0xFFFFFFFF), dtype=np.intp)
