"""Counter-based random numbers: functions of a seed and a position, never of the batch or of the clock."""

from __future__ import annotations

import os

from mnemos import native

_MASK = 0xFFFFFFFF


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number of 53 random bits in [0, 1): a function of its arguments alone.

    position is the index of the token to draw; draw distinguishes several draws for one position.
    """
    if native.core is None:
        return uniform_python(seed, position, draw)
    return native.core.uniform(seed, position, draw)


def uniform_python(seed: int, position: int, draw: int = 0) -> float:
    """The reference of `uniform`."""
    first, second, _, _ = philox(seed, position | draw << 64)
    return ((first >> 5) * 67108864 + (second >> 6)) / 9007199254740992


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words from a 64-bit key and a 128-bit counter. Salmon et al. 2011."""
    low, high = key & _MASK, key >> 32 & _MASK
    a, b, c, d = (counter >> shift & _MASK for shift in (0, 32, 64, 96))
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & _MASK, (first >> 32) ^ d ^ high, first & _MASK
        low, high = low + 0x9E3779B9 & _MASK, high + 0xBB67AE85 & _MASK
    return a, b, c, d


def fresh_seed() -> int:
    """A 64-bit seed from the operating system."""
    return int.from_bytes(os.urandom(8), "little")


def stream_seed(seed: int, stream: int) -> int:
    """The seed of a request's result number `stream`; the first result uses the request's own."""
    if stream == 0:
        return seed
    first, second, _, _ = philox(seed, stream << 96)
    return first | second << 32
