"""Log probabilities of the prompt's own tokens, before another strategy continues it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.choice import Draw, log_sum_exp_rows, top_tokens
from mnemos.decoding.forced import CHUNK
from mnemos.decoding.strategy import Advance, Branch, FinishedSequence, Rows, Strategy


class ScoredToken(NamedTuple):
    """A token of the prompt.

    logprob: its natural log probability given the tokens before it, None for the first one.
    top_logprobs: the most probable (token id, log probability) pairs in its place, as many as asked for.
    """

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class ScoredPrompt:
    """Scores the prompt, CHUNK rows of logits at a time, and then lets `continuation` continue from it.

    scores: a `ScoredToken` for each token of the prompt so far. `count`: how many most probable ones each has.
    All rows are wanted, so nothing of the prompt is taken from the prefix cache; what follows does not change.
    """

    needs_all_prompt_rows = False

    def __init__(self, continuation: Strategy, count: int) -> None:
        self.max_branches = continuation.max_branches
        self.scores: list[ScoredToken] = []
        self._continuation = continuation
        self._count = count
        self._prompt: list[int] = []
        self._draw: Draw | None = None
        self._hidden: list[Floats] = []
        self._branches: list[Branch] = []
        self._done = False

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self._prompt = list(prompt)
        self.scores.append(ScoredToken(self._prompt[0], None))
        self._branches = self._continuation.start(prompt)
        branch = self._branches[0]
        self._draw = branch.draw
        branch.draw = None  # nothing is chosen after the prompt's inner rows
        del branch.tokens[CHUNK:]
        branch.wanted = len(branch.tokens)
        return self._next()

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        if self._done:
            return self._continuation.advance(rows)
        branch = self._branches[0]
        given, end = rows[branch], len(branch.tokens)
        self._score(end - len(given.logits), given.logits)
        keeps_hidden = self._continuation.needs_all_prompt_rows
        following = self._prompt[end : end + CHUNK]
        if following:
            if keeps_hidden:
                self._hidden.append(given.hidden.copy())
            branch.tokens += following
            branch.wanted = len(following)
            return Advance(self._next())
        self._done = True
        branch.draw, branch.wanted = self._draw, 1
        hidden = np.concatenate([*self._hidden, given.hidden]) if keeps_hidden else given.hidden[-1:]
        self._hidden = []
        return self._continuation.advance({**rows, branch: Rows(given.logits[-1:], hidden)})

    def _next(self) -> list[Branch]:
        """The prompt's branch, and with its last tokens the continuation's others."""
        return self._branches if len(self._branches[0].tokens) == len(self._prompt) else self._branches[:1]

    def _score(self, start: int, rows: Floats) -> None:
        """Scores the tokens after the positions from `start` on; `rows` are their logits."""
        targets = self._prompt[start + 1 : start + 1 + len(rows)]
        totals = log_sum_exp_rows(rows[: len(targets)]).tolist()
        for token, row, total in zip(targets, rows, totals, strict=False):
            top = tuple((other, float(row[other]) - total) for other in top_tokens(row, self._count))
            self.scores.append(ScoredToken(token, float(row[token]) - total, top))


class PromptOnly:
    """The continuation of a prompt that nothing follows: `results` empty texts."""

    needs_all_prompt_rows = False
    max_branches = 1

    def __init__(self, results: int) -> None:
        self._results = results

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        return [Branch(prompt)]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        return Advance([], finished=[FinishedSequence([], "length", sequence=one) for one in range(self._results)])
