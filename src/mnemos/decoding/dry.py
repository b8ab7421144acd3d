"""Don't repeat yourself: a penalty that grows with the repetition that a token would lengthen.

By p-e-w, text-generation-webui, pull request 5677.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.history import History

_LONGEST = 128  # tokens of a repetition; a longer one is penalised no more


class DryPenalty:
    """Subtracts multiplier * base ** (length - allowed) from the logit of each token that would lengthen a repetition.

    `length` is that of the longest suffix of the text which occurred before and was followed by the token, at least
    `allowed` tokens. No repetition extends across a breaker. With `last`, only the last `last` tokens are considered.
    """

    def __init__(
        self, multiplier: float, base: float, allowed: int, breakers: Collection[int], last: int | None = None
    ) -> None:
        self._multiplier, self._base, self._allowed = multiplier, base, allowed
        self._breakers, self._last = frozenset(breakers), last

    def __call__(self, history: History, logits: Floats) -> None:
        tokens = history.array()[-(self._last or 0) :]
        if not len(tokens) or int(tokens[-1]) in self._breakers:
            return
        lengths: dict[int, int] = {}
        ends = np.flatnonzero(tokens[:-1] == tokens[-1])
        length, longest = 1, min(_LONGEST, len(tokens) - 1)
        while len(ends) and length <= longest:
            for token in np.unique(tokens[ends + 1]).tolist():
                lengths[token] = length
            previous = int(tokens[-1 - length]) if length < len(tokens) else None
            if previous is None or previous in self._breakers:
                break
            ends = ends[ends >= length]
            ends = ends[tokens[ends - length] == previous]
            length += 1
        for token, count in lengths.items():
            if count >= self._allowed and token not in self._breakers:
                logits[token] -= np.float32(self._multiplier * self._base ** (count - self._allowed))
