"""Teacher-forced evaluation of given tokens, as strategies like any other: logits and log likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.decoding.choice import log_sum_exp_rows
from mnemos.decoding.strategy import Advance, Branch, FinishedSequence, Rows

CHUNK = 128  # rows of logits that are held at once


@dataclass(frozen=True, eq=False)
class Score:
    """logprobs (tokens - 1,) float64: natural log likelihood of each token but the first, given those before it."""

    token_ids: list[int]
    logprobs: npt.NDArray[np.float64]

    @property
    def mean_nll(self) -> float:
        """Mean negative log likelihood per token, in nats."""
        return float(-self.logprobs.mean())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.mean_nll))


class TeacherForced:
    """Evaluates the prompt without generating anything, CHUNK rows at a time."""

    needs_all_prompt_rows = False
    max_branches = 1

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def take(self, start: int, logits: Floats) -> None:
        """Receives the logits of the tokens from `start` on, a view that the next step overwrites."""
        raise NotImplementedError

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self.tokens = list(prompt)
        branch = Branch(self.tokens[:CHUNK])
        branch.wanted = len(branch.tokens)
        return [branch]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        ((branch, given),) = rows.items()
        end = len(branch.tokens)
        self.take(end - len(given.logits), given.logits)
        following = self.tokens[end : end + CHUNK]
        if not following:
            return Advance([], finished=[FinishedSequence([], "stop")])
        branch.tokens += following
        branch.wanted = len(following)
        return Advance([branch])


class ForcedLogits(TeacherForced):
    """Collects `logits`, (time, vocabulary) float32."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.logits: Floats = np.empty((0, vocabulary_size), dtype=np.float32)

    def take(self, start: int, logits: Floats) -> None:
        if not start:
            self.logits = np.empty((len(self.tokens), self.vocabulary_size), dtype=np.float32)
        self.logits[start : start + len(logits)] = logits


class ForcedScore(TeacherForced):
    """Computes the log likelihood of each token but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[float] = []

    def take(self, start: int, logits: Floats) -> None:
        targets = self.tokens[start + 1 : start + 1 + len(logits)]
        rows = logits[: len(targets)]
        self.logprobs += (rows[np.arange(len(targets)), targets] - log_sum_exp_rows(rows)).tolist()

    @property
    def score(self) -> Score:
        return Score(self.tokens, np.array(self.logprobs))
