"""Contrastive search: probable tokens that do not repeat the text so far. Su et al. 2022, arXiv:2202.06417."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.choice import Constraint, DeadEnd, no_choice
from mnemos.decoding.history import History
from mnemos.decoding.processors import Processor
from mnemos.decoding.ranking import largest
from mnemos.decoding.sampling import accept, with_logprobs
from mnemos.decoding.stopping import End, StopWatch
from mnemos.decoding.strategy import Advance, Branch, Emitted, Rows


@dataclass(frozen=True)
class _Candidate:
    branch: Branch
    token: int
    probability: np.float32


class ContrastiveSearch:
    """The strategy for contrastive search.

    Each step evaluates the top_k most probable next tokens as forks of the text, and keeps the one with the largest
    (1 - alpha) * probability - alpha * (largest cosine similarity of its hidden state to those of all earlier tokens).
    """

    needs_all_prompt_rows = True

    def __init__(
        self,
        top_k: int,
        alpha: float,
        processors: Sequence[Processor],
        watch: Callable[[], StopWatch],
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.max_branches = top_k
        self._top_k = top_k
        self._alpha = np.float32(alpha)
        self._processors = processors
        self._make_watch = watch
        self._logprobs = logprobs
        self._constraint = constraint

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self._history = History(prompt)
        self._watch = self._make_watch()
        self._directions = np.empty((0, 0), np.float32)
        self._candidates: list[_Candidate] = []
        self._row = np.empty(0, np.float32)
        branch = Branch(prompt)
        self._prompt = branch
        return [branch]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        if not self._candidates:
            given = rows[self._prompt]
            self._directions = np.empty((max(1024, 2 * len(given.hidden)), given.hidden.shape[1]), np.float32)
            self._directions[: len(given.hidden)] = _normalised(given.hidden)
            return Advance(self._propose(self._prompt, given.logits[-1]))
        chosen, direction = self._choose(rows)
        emitted, end = self._accept(chosen.token)
        if end is not None:
            return Advance([], [emitted], [self._watch.finished(end, self._history)])
        self._remember(direction)
        try:
            return Advance(self._propose(chosen.branch, rows[chosen.branch].logits[-1]), [emitted])
        except DeadEnd as error:
            end = End("error", error=str(error))
            return Advance([], [emitted], [self._watch.finished(end, self._history)])

    def _propose(self, branch: Branch, logits: Floats) -> list[Branch]:
        """Forks `branch` for each of the most probable next tokens; the first keeps the branch itself."""
        self._row = logits.copy()
        row = logits.copy()
        for processor in self._processors:
            processor(self._history, row)
        if self._constraint is not None:
            self._constraint.forbid(row)
        peak = row.max()
        if not np.isfinite(peak):
            raise no_choice(row)
        weights = np.exp(row - peak)
        weights /= weights.sum()
        tokens = [int(token) for token in largest(weights, self._top_k) if weights[token] > 0]
        branches = [branch, *(branch.fork() for _ in tokens[1:])]
        for fork, token in zip(branches, tokens, strict=True):
            fork.tokens.append(token)
            fork.wanted = 1
        self._candidates = [_Candidate(f, t, weights[t]) for f, t in zip(branches, tokens, strict=True)]
        return branches

    def _choose(self, rows: Mapping[Branch, Rows]) -> tuple[_Candidate, Floats]:
        hidden = np.stack([rows[candidate.branch].hidden[-1] for candidate in self._candidates])
        directions = _normalised(hidden)
        known = self._directions[: len(self._history.tokens)]
        similarity = (known @ directions.T).max(axis=0)
        probabilities = np.array([candidate.probability for candidate in self._candidates], np.float32)
        best = int(np.argmax((1 - self._alpha) * probabilities - self._alpha * similarity))
        return self._candidates[best], directions[best]

    def _accept(self, token: int) -> tuple[Emitted, End | None]:
        self._history.append(token)
        piece, end = self._watch.push(token, self._history.tokens)
        if self._constraint is not None and end is None:
            end = accept(self._constraint, token)
        if self._logprobs is None:
            return Emitted(token, text=piece), end
        return with_logprobs(self._row, token, self._logprobs, piece=piece), end

    def _remember(self, direction: Floats) -> None:
        count = len(self._history.tokens)
        if count > len(self._directions):
            grown = np.empty((2 * count, self._directions.shape[1]), np.float32)
            grown[: count - 1] = self._directions[: count - 1]
            self._directions = grown
        self._directions[count - 1] = direction


def _normalised(hidden: Floats) -> Floats:
    """Each row divided by its length; a row of zeros stays zero."""
    lengths = np.linalg.norm(hidden, axis=1, keepdims=True)
    return np.asarray(hidden / np.where(lengths > 0, lengths, 1), dtype=np.float32)
