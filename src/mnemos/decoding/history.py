"""The tokens of one sequence, with the tables that logits processors read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats

Indices = npt.NDArray[np.int64]


class Surprises(NamedTuple):
    """Mirostat's state for a text: `bits` (vocabulary,) float32 is each token's surprise at `place`."""

    bound: float
    place: int
    bits: Floats


class History:
    """A sequence that only grows. Its tables are built on first use and then updated with new tokens only.

    tokens: the prompt (prompt_length tokens) and the generated ones; seed: that of the text's random numbers.
    early: (layers, vocabulary) logits of early layers for the next token, where a processor needs them.
    """

    def __init__(self, tokens: Sequence[int], prompt_length: int | None = None, seed: int = 0) -> None:
        self.seed = seed
        self.tokens = list(tokens)
        self.prompt_length = len(self.tokens) if prompt_length is None else prompt_length
        self.surprises: Surprises | None = None
        self.early: Floats | None = None
        self._array = np.empty(0, np.int64)
        self._read = 0
        self._seen = _Counts()
        self._generated = _Counts(self.prompt_length)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> None:
        self.tokens.append(token)

    def fork(self) -> History:
        copy = History(self.tokens, self.prompt_length, self.seed)
        copy.surprises = self.surprises
        copy._seen, copy._generated = self._seen.copy(), self._generated.copy()
        return copy

    def array(self) -> Indices:
        """All tokens as int64, a view that the next `append` may invalidate."""
        length = len(self.tokens)
        if length > len(self._array):
            grown = np.empty(2 * length, np.int64)
            grown[: self._read] = self._array[: self._read]
            self._array = grown
        if self._read < length:
            self._array[self._read : length] = self.tokens[self._read :]
            self._read = length
        return self._array[:length]

    def seen(self, last: int | None = None) -> Indices:
        """The distinct tokens of prompt and generated text, or of its `last` tokens, in no particular order."""
        return self._seen.update(self.tokens)[0] if last is None else np.unique(self.array()[-last:])

    def counts(self, last: int | None = None) -> tuple[Indices, Indices]:
        """The distinct generated tokens, or those among the `last` tokens, and the count of each."""
        if last is None:
            return self._generated.update(self.tokens)
        ids, counts = np.unique(self.array()[max(self.prompt_length, len(self.tokens) - last) :], return_counts=True)
        return ids, counts


class _Counts:
    """How often each token occurs from `start` on."""

    def __init__(self, start: int = 0) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.empty(64, np.int64)
        self._next = start

    def copy(self) -> _Counts:
        other = _Counts(self._next)
        other._slots = self._slots.copy()
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    def update(self, tokens: list[int]) -> tuple[Indices, Indices]:
        for position in range(self._next, len(tokens)):
            self._add(tokens[position])
        self._next = max(self._next, len(tokens))
        used = len(self._slots)
        return self._ids[:used], self._counts[:used]

    def _add(self, token: int) -> None:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * slot), np.resize(self._counts, 2 * slot)
            self._ids[slot], self._counts[slot] = token, 0
        self._counts[slot] += 1
