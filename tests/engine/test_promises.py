"""The engine obeys what a model promises: chunks, prefixes, drafts, batches."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.contract import Batch, Output
from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import RequestError, UnsupportedError
from tests.engine.drivers import Greedy, check_whole, make_core, make_request, run
from tests.engine.toys import ToyModel, toy_greedy

PROMPTS = [[7] * 100, [7] * 90 + [3] * 60, [5, 6], list(range(1, 80))]


def run_all(model: ToyModel, **limits: int) -> list[list[list[int]]]:
    core = make_core(model, **limits)
    requests = [make_request(Greedy(5), prompt) for prompt in PROMPTS]
    for request, _ in requests:
        core.add(request)
        core.step()
    run(core)
    check_whole(core)
    return [results.tokens for _, results in requests]


EXPECTED = [[toy_greedy(prompt, 5)] for prompt in PROMPTS]


def test_a_prompt_that_must_not_be_cut_enters_a_step_whole() -> None:
    model = ToyModel(chunks=False)
    assert run_all(model, batch_tokens=16) == EXPECTED
    sizes = [int(np.diff(batch.sequence_starts).max()) for batch in model.batches]
    assert sorted(size for size in sizes if size > 1) == sorted(len(prompt) for prompt in PROMPTS)


def test_prompts_are_cut_where_that_is_promised() -> None:
    model = ToyModel()
    assert run_all(model, batch_tokens=16) == EXPECTED
    assert max(len(batch.token_ids) for batch in model.batches) <= 16


@pytest.mark.parametrize("promise", ["shares_prefixes", "chunks"])
def test_prefixes_are_shared_only_where_that_changes_nothing(promise: str) -> None:
    model = ToyModel(**{promise: False})
    core = make_core(model)
    assert core.scheduler.tables.tree is None
    for _ in range(2):
        request, results = make_request(Greedy(5), PROMPTS[0])
        core.add(request)
        run(core)
        assert results.tokens == EXPECTED[0]
        assert request.cached_tokens == 0
    with (
        InferenceEngine(ToyModel(**{promise: False}), cache_tokens=1000) as engine,
        pytest.raises(UnsupportedError, match="toy cannot share"),
    ):
        engine.clear_prefix_cache()


def test_drafts_are_refused_where_they_cannot_be_verified() -> None:
    with InferenceEngine(ToyModel(verifies_drafts=False), cache_tokens=1000) as engine:
        with pytest.raises(RequestError, match="speculative is 'prompt_lookup'"):
            engine.generate([1, 2, 3], speculative="prompt_lookup")
        assert engine.generate([1, 2, 3], max_new_tokens=4) == [1, 2, 3, *toy_greedy([1, 2, 3], 4)]


class OneAtATime(ToyModel):
    """Refuses several sequences, and answers in one workspace that the next call overwrites."""

    def __init__(self) -> None:
        super().__init__(batches=False)
        self.workspace = np.zeros((200, 97), np.float32)

    def forward(self, batch: Batch) -> Output:
        assert batch.sequences == 1
        assert batch.sequence_starts[0] == batch.page_starts[0] == 0
        output = super().forward(batch)
        rows = self.workspace[: len(batch.logit_rows), : output.logits.shape[1]]
        rows[:] = output.logits
        return Output(rows, output.hidden, output.tokens)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3, "n": 3}, {"num_beams": 3}])
def test_a_model_of_single_sequences_is_called_once_for_each(settings: dict[str, object]) -> None:
    config = GenerationConfig(max_new_tokens=6, **settings)  # type: ignore[arg-type]
    expected, given = [], []
    for model, collected in ((ToyModel(), expected), (OneAtATime(), given)):
        core = make_core(model, batch_tokens=32)
        requests = [make_request(make_strategy(config, prompt, None, model.spec), prompt) for prompt in PROMPTS]
        for request, _ in requests:
            core.add(request)
        run(core)
        collected += [results.tokens for _, results in requests]
        steps = core.counters.steps
    assert given == expected
    assert len(model.batches) > steps
