"""The probability of each of several continuations of one prompt, all in one batch with one shared prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnemos.decoding.choice import log_sum_exp_rows
from mnemos.decoding.strategy import Advance, Branch, FinishedSequence, Rows

MOST_LANES = 16  # branches that evaluate options side by side


class Likelihood(NamedTuple):
    """Of a continuation: its log probability, and whether it is what greedy decoding would give."""

    logprob: float
    greedy: bool


class ForcedOptions:
    """Evaluates a prompt and then each option after it, without generating anything.

    options: the token ids of each, at least one. rewinds: whether the model can take back tokens, so that a branch can
    evaluate one option after another; otherwise each option of several tokens needs a branch.

    An option's log probability is the sum of those of its tokens, in natural logarithms; `greedy` says whether each of
    them was the most probable one, the lowest id on ties.
    """

    needs_all_prompt_rows = False

    def __init__(self, options: Sequence[Sequence[int]], rewinds: bool) -> None:
        self._options = [list(option) for option in options]
        self._long = [number for number, option in enumerate(self._options) if len(option) > 1]
        lanes = min(len(self._long), MOST_LANES) if rewinds else len(self._long)
        self.max_branches = max(lanes, 1)
        self.logprobs: npt.NDArray[np.float64] = np.zeros(len(self._options))
        self.greedy: npt.NDArray[np.bool_] = np.ones(len(self._options), dtype=bool)
        self._length = 0  # of the prompt
        self._waiting = list(self._long)
        self._running: dict[Branch, int] = {}  # which option each branch evaluates

    @property
    def likelihoods(self) -> list[Likelihood]:
        """Of the options, in their order, once all are evaluated."""
        return [Likelihood(float(one), bool(best)) for one, best in zip(self.logprobs, self.greedy, strict=True)]

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self._length = len(prompt)
        return [Branch(prompt)]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        if not self._running:  # the prompt has been evaluated: its last row has the first token of every option
            ((root, given),) = rows.items()
            row = given.logits[-1:]
            total = log_sum_exp_rows(row)[0]
            for number, option in enumerate(self._options):
                self.logprobs[number] = float(row[0, option[0]]) - total
                self.greedy[number] = int(row[0].argmax()) == option[0]
            forks = [root.fork() for _ in range(self.max_branches - 1)]
            return self._next([root, *forks])
        for branch, given in rows.items():
            targets = self._options[self._running[branch]][1:]
            gains = given.logits[np.arange(len(targets)), targets] - log_sum_exp_rows(given.logits)
            self.logprobs[self._running[branch]] += float(gains.sum(dtype=np.float64))
            self.greedy[self._running[branch]] &= bool((given.logits.argmax(axis=1) == targets).all())
        return self._next(list(rows))

    def _next(self, branches: list[Branch]) -> Advance:
        """Gives each branch the next option, as long as there are some."""
        self._running = {}
        for branch in branches[: len(self._waiting)]:
            number = self._waiting.pop(0)
            branch.truncate(self._length)
            branch.tokens += self._options[number][:-1]
            branch.wanted = len(self._options[number]) - 1
            self._running[branch] = number
        if not self._running:
            return Advance([], finished=[FinishedSequence([], "stop")])
        return Advance(list(self._running))
