"""Model steps timed without the engine around them: prompts, single-stream decoding, batches.

Every figure is measured as `docs/performance.md` defines it; a step includes the choice of the most probable token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from mnemos.contract import Batch, Ints, PagedModel
from mnemos.machine.memory import check_memory

CHUNK = 512  # prompt tokens in one step
WARM_UP = 16
BATCH_PROMPT, BATCH_STEPS = 64, 64  # tokens and decode steps of bN


class Stepper:
    """Runs a fixed number of sequences through a model, each with its own pages; all lengths are in tokens."""

    def __init__(self, model: PagedModel, sequences: int, length: int) -> None:
        self.model = model
        page_size = model.spec.layout.page_size
        self.pages_each = -(-length // page_size)
        tables = np.arange(sequences * self.pages_each, dtype=np.int32).reshape(sequences, self.pages_each)
        self.pages = tables.repeat(len(model.spec.layout.groups), axis=0).reshape(-1)  # equal in all layer groups
        self.page_positions = self.pages % self.pages_each * page_size
        self.sequences = sequences
        self.length = 0

    def reset(self) -> None:
        self.length = 0

    def step(self, token_ids: Sequence[Sequence[int]] | Ints) -> Ints:
        """Evaluates the next tokens of every sequence, equally many for each; returns the most probable successors."""
        count = len(token_ids[0])
        rows = self.sequences * count
        positions = np.tile(np.arange(self.length, self.length + count, dtype=np.int32), self.sequences)
        batch = Batch(
            token_ids=np.array(token_ids, dtype=np.int32).reshape(-1),
            positions=positions,
            sequence_starts=np.arange(0, rows + 1, count, dtype=np.int32),
            pages=self.pages,
            page_positions=self.page_positions,
            page_starts=np.arange(0, len(self.pages) + 1, self.pages_each, dtype=np.int32),
            logit_rows=np.arange(count - 1, rows, count, dtype=np.int32),
            greedy=True,
        )
        self.length += count
        output = self.model.forward(batch)
        tokens = output.logits.argmax(axis=1) if output.tokens is None else output.tokens
        return np.array(tokens, dtype=np.int32)

    def prompt(self, token_ids: Sequence[Sequence[int]]) -> Ints:
        """Evaluates prompts of equal length in chunks of CHUNK tokens in total."""
        each = max(CHUNK // self.sequences, 1)
        for start in range(0, len(token_ids[0]), each):
            chosen = self.step([tokens[start : start + each] for tokens in token_ids])
        return chosen

    def decode(self, chosen: Ints, steps: int) -> Ints:
        for _ in range(steps):
            chosen = self.step(chosen.reshape(-1, 1))
        return chosen


class StepBench:
    """Measures one model; it calls `reserve`, so the model must be new."""

    def __init__(self, model: PagedModel, most_sequences: int, longest: int, seed: int = 0) -> None:
        self.model = model
        page_size = model.spec.layout.page_size
        batch_pages = most_sequences * -(-(BATCH_PROMPT + BATCH_STEPS + 1) // page_size)
        pages = max(-(-longest // page_size), batch_pages)
        check_memory(pages * model.spec.layout.page_bytes, f"a cache for {most_sequences} sequences")
        model.reserve(pages)
        self.random = random.Random(seed)
        self._seconds(WARM_UP, 4)

    def prompt_rate(self, tokens: int) -> float:
        """ppN: tokens/s for a prompt of N random tokens, a new one for each of 4 runs, the best run."""
        return tokens / min(self._seconds(tokens, 1) for _ in range(4))

    def decode_rate(self, depth: int, tokens: int = 128) -> float:
        """tgN: tokens/s for N greedy tokens after a prompt of `depth` tokens and one more; the best of 3."""
        return max(self._decode(1, depth, tokens) for _ in range(3))

    def batch_rate(self, sequences: int) -> float:
        """bN: tokens/s for N sequences together, prompts of 64 tokens, 64 steps; decoding only."""
        return self._decode(sequences, BATCH_PROMPT, BATCH_STEPS)

    def _decode(self, sequences: int, prompt: int, steps: int) -> float:
        """Tokens/s of `steps` decode steps after prompts of `prompt` tokens."""
        stepper = Stepper(self.model, sequences, prompt + steps + 1)
        chosen = stepper.prompt([self._tokens(prompt) for _ in range(sequences)])
        start = time.perf_counter()
        stepper.decode(chosen, steps)
        return sequences * steps / (time.perf_counter() - start)

    def _seconds(self, prompt: int, new: int) -> float:
        stepper = Stepper(self.model, 1, prompt + new)
        tokens = [self._tokens(prompt)]
        start = time.perf_counter()
        stepper.decode(stepper.prompt(tokens), new - 1)
        return time.perf_counter() - start

    def _tokens(self, count: int) -> list[int]:
        size = self.model.spec.vocabulary_size
        return [self.random.randrange(min(100, size // 2), min(40_000, size)) for _ in range(count)]
