"""Classifier-free guidance: away from a negative prompt. Sanchez et al. 2023, arXiv:2306.17806."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.choice import log_sum_exp_rows
from mnemos.decoding.strategy import Advance, Branch, Rows, Strategy


def guide(logits: Floats, unguided: Floats, scale: float) -> Floats:
    """unguided + scale * (logits - unguided), of their log probabilities; (rows, vocabulary), float32.

    A token that is impossible after one of the prompts keeps its log probability after the first one.
    """
    wanted, avoided = (rows - log_sum_exp_rows(rows)[:, None].astype(np.float32) for rows in (logits, unguided))
    with np.errstate(invalid="ignore"):
        guided = np.float32(scale) * (wanted - avoided) + avoided
    return np.where(np.isfinite(wanted) & np.isfinite(avoided), guided, wanted)


class Guided:
    """Another strategy over guided rows.

    Each of its branches has a shadow: the negative prompt, followed by the same generated tokens. Both are evaluated in
    the same steps, and the strategy sees rows of log probabilities that `guide` makes of the two.
    """

    needs_all_prompt_rows = False

    def __init__(self, strategy: Strategy, negative: Sequence[int], scale: float) -> None:
        self.max_branches = 2 * strategy.max_branches
        self._strategy = strategy
        self._negative = list(negative)
        self._scale = scale
        self._prompt = 0
        self._shadows: dict[Branch, Branch] = {}

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self._prompt = len(prompt)
        branches = self._strategy.start(prompt)
        self._shadows = {branch: Branch(self._negative) for branch in branches}
        return self._pairs()

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        guided = {branch: self._guide(rows[branch], rows[shadow]) for branch, shadow in self._shadows.items()}
        advance = self._strategy.advance(guided)
        # All forks are made before any shadow grows.
        self._shadows = {branch: self._shadows.get(branch) or self._fork(branch) for branch in advance.branches}
        for branch, shadow in self._shadows.items():
            shadow.truncate(len(self._negative) + branch.evaluated - self._prompt)
            shadow.tokens += branch.tokens[branch.evaluated :]
            shadow.wanted = branch.wanted
        advance.branches = self._pairs()
        return advance

    def _guide(self, rows: Rows, unguided: Rows) -> Rows:
        return Rows(guide(rows.logits, unguided.logits, self._scale), rows.hidden)

    def _fork(self, branch: Branch) -> Branch:
        """A shadow for a new branch, which shares its nearest ancestor's pages."""
        ancestor = branch.parent
        while ancestor is not None and ancestor not in self._shadows:
            ancestor = ancestor.parent
        assert ancestor is not None  # every branch comes from the prompt's
        return self._shadows[ancestor].fork()

    def _pairs(self) -> list[Branch]:
        for branch in self._shadows:
            branch.draw = None  # it would be made from rows that are not guided
        return [*self._shadows, *self._shadows.values()]
