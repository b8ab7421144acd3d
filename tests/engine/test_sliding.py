"""Endless texts: what they see after a slide, what a slide costs, and that its place depends on positions alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.sliding import Sliding
from tests.engine.drivers import Greedy, check_pages, check_whole, make_core, make_request, run
from tests.engine.toys import ToyModel, Windows, toy_row

CONTEXT, LIMIT, PAGE, SINKS = 32, 96, 4, 4


def endless(prompt: Sequence[int], count: int, context: int = CONTEXT, limit: int = LIMIT) -> list[int]:
    """Greedy decoding of an endless text, computed from the whole text for every token."""
    tokens, dropped = list(prompt), 0
    if len(tokens) > context:
        dropped = len(tokens) - context // 2
    for _ in range(count):
        if len(tokens) - dropped > limit:
            dropped = len(tokens) - context // 2
        cached = tokens[:SINKS] + tokens[SINKS + dropped :]
        position = len(cached) - 1
        start = 0
        while position - start + 1 + (SINKS if start else 0) > context:
            start += context // 2
        tokens.append(int(toy_row((tokens[:SINKS] if start else []) + cached[start:], position)[0].argmax()))
    return tokens[len(prompt) :]


def test_a_text_slides_by_half_its_context_in_whole_pages() -> None:
    sliding = Sliding.of(context=32, position_limit=96, page_size=4)
    seen, start = [], 0
    for position in range(96):
        start = sliding.start(sliding.count(position))
        assert start % 4 == 0
        seen.append(position - start + 1 + (sliding.sinks if start else 0))
    assert max(seen) == 32 and min(seen[32:]) == 32 - 16 + 1
    for slide in range(1, 6):
        assert sliding.count(sliding.begin(slide)) == slide == sliding.count(sliding.begin(slide) - 1) + 1


@pytest.mark.parametrize(("context", "limit", "page"), [(32, 0, 4), (32, 96, 32), (20, 96, 8)])
def test_positions_end_with_the_context_where_pages_are_too_large_or_the_model_says_so(
    context: int, limit: int, page: int
) -> None:
    assert Sliding.of(context, limit, page).limit == context


@pytest.mark.parametrize("length", [5, 31, 32, 33, 70])
def test_an_endless_text_sees_its_first_tokens_and_its_newest_half(length: int) -> None:
    prompt = [(7 * i) % 90 + 1 for i in range(length)]
    model = ToyModel(context_length=CONTEXT, position_limit=LIMIT)
    with InferenceEngine(model, cache_tokens=CONTEXT + PAGE, prefix_cache=False) as engine:
        completion = engine.complete(prompt, overflow="sliding", max_new_tokens=220, ignore_eos=True)
    assert completion.token_ids == endless(prompt, 220)


def test_a_slide_evaluates_nothing_again_but_the_sinks() -> None:
    model = ToyModel(context_length=CONTEXT, position_limit=LIMIT)
    with InferenceEngine(model, cache_tokens=CONTEXT + PAGE, prefix_cache=False) as engine:
        engine.complete([1] * 10, overflow="sliding", max_new_tokens=LIMIT - 10, ignore_eos=True)
    slides = Sliding.of(CONTEXT, LIMIT, PAGE).count(LIMIT - 2)
    assert slides == 5
    assert engine.stats().evaluated_tokens == LIMIT - 1 + slides * SINKS
    assert engine.stats().pages_used == 0
    rows = [
        (batch.positions.tolist(), batch.token_ids.tolist()) for batch in model.batches if len(batch.positions) == 4
    ]
    assert rows[-1] == ([76, 77, 78, 79], [1, 1, 1, 1])
    last = model.batches[-1]
    assert last.page_positions.tolist() == [76, *range(80, 95, 4)]


CONFIGS = (
    GenerationConfig(overflow="sliding", max_new_tokens=90, ignore_eos=True),
    GenerationConfig(overflow="sliding", max_new_tokens=70, ignore_eos=True, n=2, temperature=1.0, seed=3),
    GenerationConfig(overflow="sliding", max_new_tokens=90, ignore_eos=True, speculative="prompt_lookup"),
)


def results_of(
    requests: Sequence[tuple[GenerationConfig, list[int]]],
    limit: int,
    window: Windows,
    pages: int = 500,
    seed: int = 0,
    drops: bool = True,
) -> list[list[list[int]]]:
    """Runs endless requests together, with urgent ones in between that preempt them if pages are scarce.

    drops: the pages that a layer's window has left.
    """
    model = ToyModel(context_length=CONTEXT, position_limit=limit, window=window, drops=drops)
    core = make_core(model, pages=pages, batch_tokens=16, prefix_cache=bool(seed % 2))
    all_results = []
    for config, prompt in requests:
        strategy = make_strategy(config, prompt, None, model.spec)
        request, results = make_request(strategy, prompt, priority=1, sliding=True)
        core.add(request)
        all_results.append(results)
    for step in range(100):
        core.step()
        check_pages(core)
        if step % 7 == seed % 7 and pages < 100:
            core.add(make_request(Greedy(2), [2 + step % 5] * 26)[0])
    run(core)
    check_whole(core)
    assert [results.error for results in all_results] == [None] * len(requests)
    return [results.tokens for results in all_results]


prompts = st.lists(st.integers(1, 3), min_size=1, max_size=50)


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.sampled_from(CONFIGS), prompts), min_size=1, max_size=3),
    limit=st.sampled_from([LIMIT, 1000]),
    window=st.sampled_from([0, (0, 9), (0, 20, 6)]),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_preempted_together_and_with_drafts_as_alone(
    requests: list[tuple[GenerationConfig, list[int]]], limit: int, window: Windows, seed: int
) -> None:
    alone = [results_of([request], limit, window, drops=False)[0] for request in requests]
    assert results_of(requests, limit, window, 21, seed) == alone
    for (config, prompt), tokens in zip(requests, alone, strict=True):
        if (
            window == 0 and config.n == 1 and (config.speculative is None or limit == 1000)
        ):  # a text restarts before its drafts
            assert tokens == [endless(prompt, config.max_new_tokens or 0, limit=limit)]
