"""Sequences whose model keeps state besides pages, or instead of them: every strategy, preemption, failure and end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.core import EngineCore
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, MnemosError, UnsupportedError
from tests.engine.drivers import Greedy, Results, Toy, Wild, check_pages, check_whole, make_core, make_request, run
from tests.engine.toys import UNREADABLE, ReaderToy, StateToy, ToyModel, reader_greedy, toy_greedy

CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=9),
    "sampled": GenerationConfig(max_new_tokens=9, temperature=1.0, seed=3, n=4),
    "best of": GenerationConfig(max_new_tokens=8, temperature=1.0, seed=5, best_of=4),
    "beams": GenerationConfig(max_new_tokens=8, num_beams=4, num_return_sequences=2),
    "contrastive": GenerationConfig(max_new_tokens=6, penalty_alpha=0.6, top_k=4),
    "speculative": GenerationConfig(max_new_tokens=20, speculative="prompt_lookup"),
}
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [9] * 50, [4], list(range(1, 40))]
both = pytest.mark.parametrize("rewinds", [True, False])


def submit(core: EngineCore, config: GenerationConfig, prompt: list[int], **fields: object) -> Results:
    request, results = make_request(make_strategy(config, prompt, None, core.model.spec), prompt, **fields)
    core.add(request)
    return results


def tokens_of(model: Toy, config: GenerationConfig, **limits: int) -> list[list[list[int]]]:
    core = make_core(model, batch_tokens=24, **limits)
    results = [submit(core, config, prompt) for prompt in PROMPTS]
    while core.has_work:
        core.step()
        check_pages(core)
    check_whole(core)
    assert [one.error for one in results] == [None] * len(results)
    return [one.tokens for one in results]


@both
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_strategy_gives_what_it_gives_on_pages(config: GenerationConfig, rewinds: bool) -> None:
    assert tokens_of(StateToy(rewinds=rewinds), config) == tokens_of(ToyModel(), config)


@both
def test_a_lone_text_is_never_copied(rewinds: bool) -> None:
    model = StateToy(rewinds=rewinds)
    tokens_of(model, CONFIGS["greedy"])
    assert model.copies == 0


def test_a_fork_takes_over_the_state_of_a_parent_that_ends() -> None:
    model = StateToy()
    core = make_core(model)
    submit(core, CONFIGS["sampled"], PROMPTS[0])
    run(core)
    assert model.copies == 3  # for four texts that grow from one prompt


@both
def test_requests_wait_for_slots_and_are_preempted_for_them(rewinds: bool) -> None:
    config = CONFIGS["sampled"]
    core = make_core(StateToy(rewinds=rewinds), states=9, sequences=16, batch_tokens=24)
    results = [submit(core, config, prompt, priority=9 - number) for number, prompt in enumerate(PROMPTS)]
    core.step()
    late = [submit(core, config, prompt, priority=-1) for prompt in PROMPTS]
    while core.has_work:
        core.step()
        check_pages(core)
    expected = tokens_of(ToyModel(), config)
    assert [one.tokens for one in results] == expected
    assert [one.tokens for one in late] == expected
    assert core.scheduler.preemptions > 0
    check_whole(core)


def test_more_branches_than_slots_are_refused() -> None:
    core = make_core(StateToy(), states=3)
    wide, fitting = submit(core, CONFIGS["sampled"], PROMPTS[0]), submit(core, CONFIGS["greedy"], PROMPTS[0])
    run(core)
    assert isinstance(wide.error, CapacityError)
    assert "more than the 3 state slots" in str(wide.error)
    assert fitting.tokens == [toy_greedy(PROMPTS[0], 9)]
    check_whole(core)


@both
def test_endless_texts_slide_as_they_do_on_pages(rewinds: bool) -> None:
    texts = []
    for model in (ToyModel(context_length=32), StateToy(context_length=32, rewinds=rewinds)):
        core = make_core(model)
        request, results = make_request(Greedy(100), [1, 2, 3], sliding=True)
        core.add(request)
        run(core)
        texts.append(results.tokens)
        check_whole(core)
    assert texts[0] == texts[1]


@both
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_workloads(rewinds: bool, data: st.DataObject) -> None:
    """Wild strategies, which check each row; cancelled, failing and preempted ones among them."""
    model = StateToy(rewinds=rewinds)
    model.fail_on = 96
    core = make_core(model, batch_tokens=data.draw(st.sampled_from([16, 24, 64])), states=12, sequences=9)
    running = []
    for _ in range(data.draw(st.integers(2, 7))):
        prompt = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=44))
        strategy = Wild(
            data.draw(st.integers(0, 999)), 6, data.draw(st.integers(1, 4)), all_rows=data.draw(st.booleans())
        )
        running.append(make_request(strategy, prompt, priority=data.draw(st.integers(0, 2))))
        core.add(running[-1][0])
        for _ in range(data.draw(st.integers(0, 5))):
            core.step()
            check_pages(core)
    if data.draw(st.booleans()):
        core.cancel(running.pop()[0])
    run(core)
    check_whole(core)
    for _, results in running:
        assert isinstance(results.error, (type(None), ArithmeticError, CapacityError)), results.error


def test_states_take_no_pages_and_no_prefix_tree() -> None:
    with InferenceEngine(StateToy()) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=9) == [p + toy_greedy(p, 9) for p in PROMPTS]
        stats = engine.stats()
        assert stats.pages_total == stats.pages_used == 0
        assert stats.states_total == 128
        assert stats.states_used == 0
        with pytest.raises(UnsupportedError, match="toy cannot share"):
            engine.save_prefix_cache("nowhere")


class TestReaders:
    """Models that read the prompt with an encoder."""

    @both
    def test_each_prompt_is_read_once_and_forks_copy_it(self, rewinds: bool) -> None:
        model = ReaderToy(rewinds=rewinds)
        with InferenceEngine(model) as engine:
            for settings_ in ({}, {"num_beams": 1}, {"n": 1, "temperature": 1.0, "top_k": 1}):
                model.read.clear()
                results = engine.complete(PROMPTS, max_new_tokens=9, **settings_)
                assert [one.token_ids for one in results] == [reader_greedy(prompt, 9) for prompt in PROMPTS]
                assert [one.usage.prompt_tokens for one in results] == [len(prompt) for prompt in PROMPTS]
                assert sorted(model.read) == sorted(PROMPTS)
            model.read.clear()
            several = engine.complete(PROMPTS[0], max_new_tokens=9, n=3, temperature=1.0, top_k=1)
            assert [choice.token_ids for choice in several.choices] == [reader_greedy(PROMPTS[0], 9)] * 3
            assert model.read == [PROMPTS[0]]

    @both
    def test_a_preempted_prompt_is_read_again(self, rewinds: bool) -> None:
        model = ReaderToy(rewinds=rewinds)
        core = make_core(model, sequences=1)
        slow, results = make_request(Greedy(20), [3], source=[1, 2], priority=5)
        core.add(slow)
        core.step()
        urgent, others = make_request(Greedy(2), [3], source=[8])
        core.add(urgent)
        run(core)
        assert slow.preemptions == 1
        assert results.tokens == [reader_greedy([1, 2], 20)]
        assert others.tokens == [reader_greedy([8], 2)]
        assert model.read == [[1, 2], [8], [1, 2]]
        check_whole(core)

    def test_a_prompt_that_cannot_be_read_fails_alone(self) -> None:
        with InferenceEngine(ReaderToy()) as engine:
            good, bad = engine.submit([1, 2], max_new_tokens=30), engine.submit([UNREADABLE], max_new_tokens=3)
            with pytest.raises(MnemosError, match="cannot read"):
                bad.result()
            assert good.result().token_ids == reader_greedy([1, 2], 30)
            assert engine.stats().states_used == 0

    def test_texts_alone_have_no_score(self) -> None:
        with InferenceEngine(ReaderToy()) as engine, pytest.raises(UnsupportedError, match="has an encoder"):
            engine.score([[1, 2, 3]])


def test_a_batch_names_a_state_for_each_sequence_and_none_without() -> None:
    for model, states in ((StateToy(), 4), (ToyModel(), 0)):
        tokens_of(model, CONFIGS["greedy"])
        assert all(batch.states.dtype == np.int32 for batch in model.batches)
        assert max(len(batch.states) for batch in model.batches) == states
