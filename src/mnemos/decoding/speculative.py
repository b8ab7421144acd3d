"""Guesses of the next tokens, several of which are verified in one step. They change the time, never the text.

A draft token is accepted where it equals the token that is chosen there anyway. Greedy decoding is then exact bit by
bit; so is sampling, because its random numbers depend on seed and position only: the text, and so its distribution, is
the same as without drafts. Guesses come from the text itself, or from a small model that the engine runs.
Sources: Leviathan et al. 2022, arXiv:2211.17192; prompt lookup: Saxena 2023.
"""

from __future__ import annotations

import math

import numpy as np

from mnemos.decoding.history import History, Indices

DEFAULT_DRAFT_TOKENS = 10
_SHORTEST_MATCH = 2
_LONGEST_MATCH = 16


class DraftLength:
    """Decides how many tokens are worth drafting, from the success of earlier drafts.

    If a draft token is right with probability p, the k-th one helps with probability p**k. It is worth its place in the
    batch while that exceeds `cost`, the time of one more row as a share of a step's. Once nothing is worth drafting,
    the estimate recovers slowly, so that a single token is tried from time to time.
    """

    def __init__(self, most: int, cost: float = 0.2) -> None:
        self._most = most
        self._cost = cost
        self._probability = 0.5

    def next(self) -> int:
        probability = self._probability
        if probability <= self._cost:
            self._probability += 0.02 * (1.2 * self._cost - probability)
            return 0
        if probability >= 0.99:
            return self._most
        return min(int(math.log(self._cost) / math.log(probability)), self._most)

    def learn(self, drafted: int, accepted: int) -> None:
        for _ in range(accepted):
            self._probability += 0.25 * (1 - self._probability)
        if accepted < drafted:
            self._probability -= 0.25 * self._probability


class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the latest tokens; the longest match counts."""

    def __init__(self, most: int) -> None:
        self._length = DraftLength(most)

    def draft(self, history: History, limit: int) -> list[int]:
        size = min(self._length.next(), limit)
        if size < 1:
            return []
        tokens = history.array()
        place = _last_match(tokens)
        if place is None:
            return []
        period = len(tokens) - place  # beyond the text's end, the draft repeats itself
        return [int(tokens[place + i % period]) for i in range(size)]

    def learn(self, drafted: int, accepted: int) -> None:
        self._length.learn(drafted, accepted)


class DraftModel:
    """Leaves the guesses to the engine's draft model, and decides how many are worth its time."""

    def __init__(self, most: int) -> None:
        self._length = DraftLength(most, cost=0.4)  # a row of the batch and a step of the draft model

    def draft(self, history: History, limit: int) -> int:
        """How many tokens to guess."""
        return min(self._length.next(), limit)

    def learn(self, drafted: int, accepted: int) -> None:
        self._length.learn(drafted, accepted)


def _last_match(tokens: Indices) -> int | None:
    """The index after the latest of the longest earlier occurrences of the text's end; None without one."""
    count = len(tokens)
    if count <= _SHORTEST_MATCH:
        return None
    ends = np.flatnonzero(tokens[: count - 1] == tokens[-1])
    for length in range(2, _LONGEST_MATCH + 1):
        longer = ends[ends >= length - 1]
        longer = longer[tokens[longer - (length - 1)] == tokens[count - length]]
        if len(longer) == 0:
            return None if length <= _SHORTEST_MATCH else int(ends[-1]) + 1
        ends = longer
    return int(ends[-1]) + 1
