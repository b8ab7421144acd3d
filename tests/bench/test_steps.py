"""The benchmark drives a model with sound batches; its measurements are not judged here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mnemos.bench import steps
from mnemos.bench.steps import CHUNK, StepBench, Stepper
from mnemos.contract import Batch, KVLayout, ModelSpec, Output

VOCABULARY = 50


class CountingModel:
    """Predicts the last token plus one, and records its batches."""

    def __init__(self) -> None:
        self.spec = ModelSpec("counting", VOCABULARY, 4096, 8, KVLayout(1, 1, 8, page_size=32))
        self.cache = SimpleNamespace()
        self.reserved = 0
        self.batches: list[Batch] = []

    def reserve(self, pages: int) -> None:
        self.reserved = pages

    def forward(self, batch: Batch) -> Output:
        self.batches.append(batch)
        logits = np.zeros((len(batch.logit_rows), VOCABULARY), dtype=np.float32)
        logits[np.arange(len(logits)), (batch.token_ids[batch.logit_rows] + 1) % VOCABULARY] = 1
        return Output(logits, np.zeros((len(logits), 8), dtype=np.float32))


def assert_sound(batch: Batch, pages: int) -> None:
    rows = len(batch.token_ids)
    assert batch.sequence_starts[0] == 0 and batch.sequence_starts[-1] == rows
    assert len(batch.positions) == rows
    for s in range(batch.sequences):
        own = batch.pages[batch.page_starts[s] : batch.page_starts[s + 1]]
        positions = batch.positions[batch.sequence_starts[s] : batch.sequence_starts[s + 1]]
        assert positions.max() // 32 < len(own)
        assert batch.page_positions[batch.page_starts[s] : batch.page_starts[s + 1]].tolist() == [
            *range(0, 32 * len(own), 32)
        ]
        assert own.max() < pages
    assert len(set(batch.pages.tolist())) == len(batch.pages)
    assert all(a.dtype == np.int32 for a in (batch.token_ids, batch.positions, batch.pages, batch.logit_rows))


def test_steps_continue_every_sequence_by_itself() -> None:
    model = CountingModel()
    stepper = Stepper(model, sequences=3, length=20)
    chosen = stepper.prompt([[1, 2, 3], [11, 12, 13], [21, 22, 23]])
    assert chosen.tolist() == [4, 14, 24]
    assert stepper.decode(chosen, 5).tolist() == [9, 19, 29]
    assert model.batches[-1].positions.tolist() == [7, 7, 7]
    for batch in model.batches:
        assert_sound(batch, 3)


def test_long_prompts_come_in_chunks() -> None:
    model = CountingModel()
    Stepper(model, 1, 2 * CHUNK).prompt([[5] * (CHUNK + 100)])
    assert [len(batch.token_ids) for batch in model.batches] == [CHUNK, 100]


def test_the_time_of_a_prompt_is_no_part_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes a second, and the first six steps, warm-up included, half a second longer."""
    model = CountingModel()

    def seconds() -> float:
        return sum(len(batch.token_ids) for batch in model.batches) + min(len(model.batches), 6) / 2

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=seconds))
    assert StepBench(model, 1, 300).decode_rate(depth=100, tokens=1) == pytest.approx(1)


@pytest.mark.parametrize("sequences", [1, 4])
def test_every_rate_is_positive_and_stays_within_its_pages(sequences: int) -> None:
    model = CountingModel()
    bench = StepBench(model, sequences, 300)
    assert bench.prompt_rate(128) > 0
    assert bench.decode_rate(depth=100, tokens=16) > 0
    assert bench.batch_rate(sequences) > 0
    for batch in model.batches:
        assert_sound(batch, model.reserved)
