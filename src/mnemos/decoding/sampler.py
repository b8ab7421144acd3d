"""Choosing a token from a row of logits: the most probable one, or a draw with counter-based random numbers.

The functions that end in _numpy are the reference; the others take the native core where it is built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mnemos import native
from mnemos.errors import RequestError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]
_MASK = 0xFFFFFFFF
_FIRST_CANDIDATES = 256


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words of a 64-bit key and a 128-bit counter. Salmon et al. 2011."""
    low, high = key & _MASK, key >> 32 & _MASK
    a, b, c, d = (counter >> shift & _MASK for shift in (0, 32, 64, 96))
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & _MASK, (first >> 32) ^ d ^ high, first & _MASK
        low, high = low + 0x9E3779B9 & _MASK, high + 0xBB67AE85 & _MASK
    return a, b, c, d


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number from 0 to below 1, of 53 random bits: a function of its arguments alone.

    position is the index in the sequence of the token to be drawn, draw numbers several draws for one position.
    """
    first, second, _, _ = philox(seed, position | draw << 64)
    return ((first >> 5) * 67108864 + (second >> 6)) / 9007199254740992


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


def stream_seed(seed: int, stream: int) -> int:
    """The seed of a request's result number `stream`; the first result's is the request's own."""
    if stream == 0:
        return seed
    first, second, _, _ = philox(seed, stream << 96)
    return first | second << 32


@dataclass(frozen=True)
class Cutoffs:
    """The common parameters of sampling; top_k 0, top_p 1 and min_p 0 cut nothing off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @cached_property
    def arrays(self) -> tuple[Floats, Ints, Doubles, Doubles]:
        """As the native core takes them."""
        temperature, top_k = np.array([self.temperature], np.float32), np.array([self.top_k], np.int32)
        return temperature, top_k, np.array([self.top_p]), np.array([self.min_p])


def greedy(logits: Floats) -> int:
    """The most probable token, of equal ones the lowest id. Raises RequestError if none is possible."""
    return greedy_numpy(logits) if native.core is None else int(native.core.greedy(logits[None])[0])


def sample(logits: Floats, cutoffs: Cutoffs, random: float) -> int:
    """The token at `random` (0 to 1) of the cumulative distribution over tokens in descending probability.

    Of equally probable tokens the lower id comes first. The distribution is softmax(logits / temperature) cut off by
    top_k, top_p and min_p in this order. Only as many candidates are sorted as the draw needs. Raises RequestError if
    no token is possible.
    """
    if native.core is None:
        return sample_numpy(logits, cutoffs, random)
    return int(native.core.sample(logits[None], *cutoffs.arrays, np.array([random]))[0])


def log_sum_exp(logits: Floats) -> float:
    return log_sum_exp_numpy(logits) if native.core is None else float(native.core.log_sum_exp(logits[None])[0])


def top_tokens(logits: Floats, count: int) -> list[int]:
    """The `count` most probable tokens, most probable first, equal ones by ascending id."""
    count = min(count, len(logits))
    if count == 0:
        return []
    ids = largest(logits, count) if native.core is None else native.core.top_tokens(logits, count)
    return [int(token) for token in ids]


def greedy_numpy(logits: Floats) -> int:
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise no_choice(logits)
    return token


def sample_numpy(logits: Floats, cutoffs: Cutoffs, random: float) -> int:
    peak = logits.max()
    if not np.isfinite(peak):
        raise no_choice(logits)
    weights = _weights(logits, peak, cutoffs.temperature)
    if 0 < cutoffs.top_k < len(logits):
        place = len(logits) - cutoffs.top_k
        weights[logits < np.partition(logits, place)[place]] = 0
    if cutoffs.top_p < 1:
        reach = cutoffs.top_p * _sum(weights)
        ids, cumulative = _head(weights, reach)
        size = int(np.searchsorted(cumulative, reach, side="left")) + 1
        size = min(size, int(np.count_nonzero(weights[ids] >= np.float32(cutoffs.min_p))))
        ids, cumulative = ids[:size], cumulative[:size]
        target = random * float(cumulative[-1])
    else:
        weights[weights < np.float32(cutoffs.min_p)] = 0
        target = random * _sum(weights)
        ids, cumulative = _head(weights, target)
    place = int(np.searchsorted(cumulative, target, side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _sum(weights: Floats) -> float:
    return float(weights.sum(dtype=np.float64))


def _head(weights: Floats, reach: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The most probable tokens, enough that their weights sum to more than `reach`, and the cumulative weights.

    Where rounding keeps the sum below that, all tokens with a weight above 0.
    """
    ids, cumulative = covering(weights, weights, reach, _FIRST_CANDIDATES)
    possible = int(np.count_nonzero(weights[ids]))
    return ids[:possible], cumulative[:possible]


def covering(
    keys: Floats, weights: Floats, reach: float, first: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Indices in descending order of their keys, until their weights sum to more than `reach`, and the running sums.

    `first` is how many are tried first. All are returned where the sum never gets there.
    """
    size = first
    while True:
        ids = largest(keys, min(size, len(keys)))
        cumulative = np.cumsum(weights[ids], dtype=np.float64)
        if cumulative[-1] > reach or size >= len(keys):
            return ids, cumulative
        size *= 8


def _weights(logits: Floats, peak: np.float32, temperature: float) -> Floats:
    scaled = logits - peak
    if temperature != 1:
        scaled /= np.float32(temperature)
    return np.exp(scaled, out=scaled)


def largest(weights: Floats, size: int) -> npt.NDArray[np.intp]:
    """The indices of the `size` largest weights, descending, equal ones by ascending index."""
    if size < len(weights):
        smallest = np.partition(weights, len(weights) - size)[len(weights) - size]
        above = np.flatnonzero(weights > smallest)
        ids = np.concatenate([above, np.flatnonzero(weights == smallest)[: size - len(above)]])
    else:
        ids = np.arange(len(weights))
    return ids[descending(weights[ids])]


def descending(values: Floats) -> npt.NDArray[np.intp]:
    """The order of the largest value first, equal ones as they come; much faster than NumPy's own stable argsort.

    Value and index are packed into one integer each, for which sorting is vectorised.
    """
    bits = (0.0 - values).view(np.uint32)  # 0.0 - value is never minus zero, which would differ in its bits
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    packed = ascending << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    packed.sort()
    return np.asarray(packed & np.uint64(0xFFFFFFFF), dtype=np.intp)


def log_sum_exp_numpy(logits: Floats) -> float:
    peak = float(logits.max())
    return peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))


def no_choice(logits: Floats) -> RequestError:
    """The error of a row from which nothing can be chosen."""
    bad = np.flatnonzero(~(logits < np.inf))
    if not len(bad):
        return RequestError(
            "every token is forbidden here; loosen bad_words, logit_bias, the constraint or the processors"
        )
    return RequestError(
        f"the logit of token {bad[0]} is {logits[bad[0]]}; logits must be numbers below infinity to choose a token"
    )
