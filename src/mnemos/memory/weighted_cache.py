"""A cache of values by name that drops the ones used least, lately or often."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf, log2
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Entry(Generic[Value]):
    value: Value
    size: int
    weight: float  # log2 of the decayed number of uses, at the last one
    used: int  # the last use, in the cache's own time
    rank: tuple[float, int] = (0.0, 0)


class WeightedCache(Generic[Value]):
    """At most `entries` values, and `most_bytes` bytes of them together where that is given.

    half_life: 0 drops the least recently used value. Else every use counts for one, halved each time that this many
    further uses of the cache have passed, and the value with the lowest sum is dropped: between the least recently used
    (a short half-life) and the least frequently used (a long one). That order does not change as time passes, so a heap
    holds it. Source: Lee et al., LRFU: a spectrum of policies, IEEE Transactions on Computers 50 (2001).
    """

    def __init__(self, entries: int, most_bytes: int | None = None, half_life: float = 0.0) -> None:
        self.entries = entries
        self.most_bytes = most_bytes
        self.half_life = half_life
        self.hits = self.misses = self.dropped = 0
        self.bytes = 0
        self._time = 0
        self._held: dict[str, _Entry[Value]] = {}
        self._heap: list[tuple[tuple[float, int], str]] = []

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        """The names, the next to be dropped first."""
        return iter([name for name, _ in self.items()])

    def items(self) -> list[tuple[str, Value]]:
        """Names and values, the next to be dropped first."""
        ordered = sorted(self._held.items(), key=lambda item: item[1].rank)
        return [(name, entry.value) for name, entry in ordered]

    def peek(self, name: str) -> Value | None:
        """The value, without counting that as a use."""
        entry = self._held.get(name)
        return None if entry is None else entry.value

    def get(self, name: str) -> Value | None:
        """The value, which counts as a use; None if there is none."""
        entry = self._held.get(name)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._use(name, entry)
        return entry.value

    def put(self, name: str, value: Value, size: int | None = None) -> list[str]:
        """Adds or replaces a value, which counts as a use; returns the names of those dropped for it.

        size: in bytes, estimated by default. A value that is larger than the cache is not kept.
        """
        size = size_of(value) if size is None else size
        if self.most_bytes is not None and size > self.most_bytes:
            self.remove(name)
            self.dropped += 1
            return [name]
        entry = self._held.get(name)
        if entry is None:
            entry = self._held[name] = _Entry(value, 0, -inf, self._time)
        self.bytes += size - entry.size
        entry.value, entry.size = value, size
        self._use(name, entry)
        return self.shrink()

    def remove(self, name: str) -> None:
        """Drops a value, if there is one of that name."""
        entry = self._held.pop(name, None)
        if entry is not None:
            self.bytes -= entry.size

    def clear(self) -> None:
        """Drops everything; what was counted stays."""
        self._held.clear()
        self._heap.clear()
        self.bytes = 0

    def shrink(self) -> list[str]:
        """Drops what is beyond the limits, which may have changed; returns the names."""
        names = []
        while len(self) > self.entries or (self.most_bytes is not None and self.bytes > self.most_bytes):
            rank, name = heappop(self._heap)
            entry = self._held.get(name)
            if entry is not None and entry.rank == rank:  # else it was used after this was written
                self.remove(name)
                self.dropped += 1
                names.append(name)
        return names

    def _use(self, name: str, entry: _Entry[Value]) -> None:
        self._time += 1
        if self.half_life:
            before = entry.weight - (self._time - entry.used) / self.half_life
            entry.weight = log2(1 + 2**before)
            order = entry.weight + self._time / self.half_life
        else:
            order = float(self._time)
        entry.used = self._time
        entry.rank = (order, self._time)
        heappush(self._heap, (entry.rank, name))
        if len(self._heap) > 2 * len(self._held) + 64:
            self._heap = [(one.rank, held) for held, one in self._held.items()]
            heapify(self._heap)


def size_of(value: object) -> int:
    """Roughly how many bytes a value takes: an array's own, a text's or a number's, a container's with its items."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(size_of(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return sys.getsizeof(value) + sum(map(size_of, value))
    return sys.getsizeof(value)
