"""A model that fails on a step: only the requests that make it fail end; the others get the same results as alone."""

from __future__ import annotations

import pytest

from mnemos.contract import Batch, Output
from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import MnemosError
from tests.engine.drivers import Greedy, Toy, check_whole, make_core, make_request, run
from tests.engine.toys import VOCABULARY, ReaderToy, StateToy, ToyModel, toy_greedy

POISON = VOCABULARY  # a token that makes the model fail and that nothing generates


@pytest.mark.parametrize("make_model", [ToyModel, StateToy, lambda: ToyModel(batches=False)])
@pytest.mark.parametrize("guilty", [{0}, {5}, {2, 3}, {0, 1, 2, 3, 4, 5}])
def test_only_the_guilty_end(make_model: type[Toy], guilty: set[int]) -> None:
    model = make_model()
    model.fail_on = POISON
    core = make_core(model)
    prompts = [[number + 1] * (number + 3) + [POISON] * (number in guilty) for number in range(6)]
    results = []
    for prompt in prompts:
        request, collected = make_request(Greedy(7), prompt)
        core.add(request)
        results.append(collected)
    run(core)
    for number, (prompt, collected) in enumerate(zip(prompts, results, strict=True)):
        if number in guilty:
            assert isinstance(collected.error, ArithmeticError)
        else:
            assert collected.tokens == [toy_greedy(prompt, 7)]
    assert core.counters.failed == len(guilty)
    check_whole(core)


def test_branches_and_chunks_go_through_halves() -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=3)

    def results_beside(poisoned: int) -> list[object]:
        model = ToyModel()
        model.fail_on = POISON
        core = make_core(model, batch_tokens=24)
        kept = []
        for number in range(4):
            prompt = [number + 1] * (20 * number + 2)
            request, collected = make_request(make_strategy(config, prompt, None, model.spec), prompt)
            core.add(request)
            kept.append(collected)
            if number < poisoned:
                core.add(make_request(Greedy(1), [POISON])[0])
            core.step()
        run(core)
        check_whole(core)
        return [one.tokens for one in kept]

    assert results_beside(4) == results_beside(0)


def test_a_state_that_cannot_go_back_is_not_evaluated_again() -> None:
    model = StateToy(rewinds=False)
    model.fail_on = POISON
    core = make_core(model)
    requests = [make_request(Greedy(3), prompt) for prompt in ([1, 2], [POISON])]
    for request, _ in requests:
        core.add(request)
    run(core)
    assert all(isinstance(collected.error, ArithmeticError) for _, collected in requests)
    check_whole(core)


def test_a_prompt_that_cannot_be_read_is_one_requests_failure() -> None:
    core = make_core(ReaderToy())
    requests = [make_request(Greedy(3), [3], source=source) for source in ([1, 2], [95])]
    for request, _ in requests:
        core.add(request)
    run(core)
    assert requests[0][1].error is None
    assert isinstance(requests[1][1].error, ArithmeticError)


class Short(ToyModel):
    """Returns one row too few."""

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        return Output(output.logits[1:], output.hidden[1:])


def test_a_model_that_returns_too_few_rows_is_told_so() -> None:
    core = make_core(Short())
    request, collected = make_request(Greedy(3), [1, 2])
    core.add(request)
    run(core)
    assert isinstance(collected.error, MnemosError)
    assert "0 rows of logits and 0 hidden states; 1 were asked for" in str(collected.error)


class Leaves(ToyModel):
    """Ends its thread, if it may."""

    def forward(self, batch: Batch) -> Output:
        if batch.token_ids.tolist().count(VOCABULARY - 1) > 2:
            raise SystemExit(3)
        return super().forward(batch)


def test_what_would_end_the_engines_thread_ends_one_request() -> None:
    def leave(token_ids: object, logits: object) -> None:
        raise SystemExit(4)

    with InferenceEngine(Leaves(), cache_tokens=4000) as engine:
        handles = [engine.submit(prompt, max_new_tokens=5) for prompt in ([1, 2], [VOCABULARY - 1] * 3, [3])]
        assert handles[0].result().token_ids == toy_greedy([1, 2], 5)
        with pytest.raises(MnemosError, match="the request failed: SystemExit: 3"):
            handles[1].result()
        assert handles[2].result().token_ids == toy_greedy([3], 5)
        with pytest.raises(MnemosError, match="SystemExit: 4"):
            engine.submit([1, 2], logits_processors=[leave]).result()
        assert engine.generate([3], max_new_tokens=5) == [3, *toy_greedy([3], 5)]
