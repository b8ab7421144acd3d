"""Teacher-forced evaluation of given tokens, as strategies like any other: logits, log likelihoods and embeddings."""

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


class ForcedReading:
    """Evaluates the prompt and nothing else, for what it leaves in the prefix cache."""

    needs_all_prompt_rows = False
    max_branches = 1

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        return [Branch(list(prompt))]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        return Advance([], finished=[FinishedSequence([], "stop")])


class TeacherForced:
    """Evaluates the prompt without generating anything, CHUNK rows at a time."""

    needs_all_prompt_rows = False
    max_branches = 1

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def take(self, start: int, rows: Rows) -> None:
        """Receives the rows of the tokens from `start` on, views that the next step overwrites."""
        raise NotImplementedError

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self.tokens = list(prompt)
        branch = Branch(self.tokens[:CHUNK])
        branch.wanted = len(branch.tokens)
        return [branch]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        ((branch, given),) = rows.items()
        end = len(branch.tokens)
        self.take(end - len(given.logits), given)
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

    def take(self, start: int, rows: Rows) -> None:
        if not start:
            self.logits = np.empty((len(self.tokens), self.vocabulary_size), dtype=np.float32)
        self.logits[start : start + len(rows.logits)] = rows.logits


class ForcedScore(TeacherForced):
    """Computes the log likelihood of each token but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: list[float] = []

    def take(self, start: int, rows: Rows) -> None:
        targets = self.tokens[start + 1 : start + 1 + len(rows.logits)]
        logits = rows.logits[: len(targets)]
        self.logprobs += (logits[np.arange(len(targets)), targets] - log_sum_exp_rows(logits)).tolist()

    @property
    def score(self) -> Score:
        return Score(self.tokens, np.array(self.logprobs))


class ForcedEmbedding(TeacherForced):
    """Pools the last hidden states (after the last norm) of a text's tokens into one vector.

    pooling: "mean" of all tokens, or the "last" token's. normalize: to length 1.
    """

    def __init__(self, pooling: str, normalize: bool) -> None:
        super().__init__()
        self._pools_all = pooling == "mean"
        self._normalize = normalize
        self._sum: npt.NDArray[np.float64] = np.zeros(0)

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        if self._pools_all:
            return super().start(prompt)
        self.tokens = list(prompt)
        return [Branch(prompt)]

    def take(self, start: int, rows: Rows) -> None:
        # In chunks that depend on the text alone, so that what else runs does not change the order of the additions.
        total = rows.hidden.sum(axis=0, dtype=np.float64)
        self._sum = total if not len(self._sum) else self._sum + total

    @property
    def embedding(self) -> Floats:
        """float32 (hidden size,); zeros stay zeros."""
        vector = self._sum / (len(self.tokens) if self._pools_all else 1)
        length = np.linalg.norm(vector) if self._normalize else 1.0
        return (vector / (length or 1.0)).astype(np.float32)
