"""Answers that are given again: the same ones for the same requests, marked, and never another tenant's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, MnemosError
from mnemos.memory.response_cache import ResponseCache
from tests.engine.toys import ToyModel, toy_greedy

PROMPT = list(range(1, 30))


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), cache_tokens=4000, response_cache=ResponseCache(4)) as made:
        yield made


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"temperature": 1.0, "seed": 5, "logprobs": 2, "n": 2},
        {"prompt_logprobs": 1},
    ],
)
def test_the_same_request_gets_the_same_answer_at_once(engine: InferenceEngine, config: dict[str, Any]) -> None:
    first = engine.complete(PROMPT, max_new_tokens=6, **config)
    evaluated = engine.stats().evaluated_tokens
    again = engine.complete(PROMPT, max_new_tokens=6, **config)
    assert engine.stats().evaluated_tokens == evaluated
    assert again.choices == first.choices and again.prompt_logprobs == first.prompt_logprobs
    assert first.cached is None and again.cached is not None and again.cached.kind == "exact"
    assert again.usage.cached_tokens == len(PROMPT) == again.usage.prompt_tokens
    assert again.usage.completion_tokens == first.usage.completion_tokens and not math.isnan(again.timings.total)
    streamed = [token.token_id for token in engine.stream(PROMPT, max_new_tokens=6, **config) if token.sequence == 0]
    assert [token for token in streamed if token is not None] == first.choices[0].token_ids
    assert engine.generate([PROMPT], max_new_tokens=6, **config) == engine.generate(
        [PROMPT], max_new_tokens=6, **config
    )


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another"},
        {"cache_salt": "mine"},
        {"max_new_tokens": 7},
        {"repetition_penalty": 1.1},
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 1},
        {"logits_processors": [lambda ids, logits: logits]},
    ],
)
def test_what_differs_is_generated(engine: InferenceEngine, other: dict[str, Any]) -> None:
    engine.complete(PROMPT, max_new_tokens=6)
    assert engine.complete(PROMPT, **{"max_new_tokens": 6, **other}).cached is None
    assert engine.complete(PROMPT, max_new_tokens=6, priority=3).cached is not None  # that changes the time only


def test_chance_and_functions_are_never_kept(engine: InferenceEngine) -> None:
    for config in ({"temperature": 1.0}, {"logits_processors": [lambda ids, logits: logits]}):
        assert [engine.complete(PROMPT, max_new_tokens=4, **config).cached for _ in range(2)] == [None, None]


def test_incomplete_and_failed_answers_are_not_kept(engine: InferenceEngine) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=200):
        break
    whole = engine.complete(PROMPT, max_new_tokens=200)
    assert whole.cached is None and whole.finish_reason != "cancelled"
    engine.model.fail_on = 66
    for _ in range(2):
        with pytest.raises(MnemosError, match="the toy broke"):
            engine.complete([66], max_new_tokens=2)


def test_a_session_generates_its_own(tmp_path: Path) -> None:
    with InferenceEngine(ToyModel(), response_cache=9, session_dir=tmp_path) as engine:
        engine.complete(PROMPT, max_new_tokens=4)
        evaluated = engine.stats().evaluated_tokens
        completion = engine.session("notes").submit(PROMPT, max_new_tokens=4).result()
        assert completion.cached is None and completion.token_ids == toy_greedy(PROMPT, 4)
        assert engine.stats().evaluated_tokens > evaluated  # its pages are its own to keep


def test_the_least_recently_used_goes_first() -> None:
    cache = ResponseCache(2)
    with InferenceEngine(ToyModel(), response_cache=cache) as engine:
        for token in (1, 2, 1, 3):
            engine.complete([token], max_new_tokens=2)
        assert len(cache) == 2 and (cache.exact_hits, cache.misses) == (1, 3)
        assert engine.complete([1], max_new_tokens=2).cached is not None
        assert engine.complete([2], max_new_tokens=2).cached is None
        cache.clear()
        assert engine.complete([1], max_new_tokens=2).cached is None


def test_engines_share_a_cache_only_for_one_model() -> None:
    cache = ResponseCache()
    for fingerprint, hits in (("a", 0), ("a", 1), ("b", 1), ("", 1), ("", 1)):
        with InferenceEngine(ToyModel(fingerprint=fingerprint), response_cache=cache) as engine:
            assert engine.generate([5], max_new_tokens=3)[1:] == toy_greedy([5], 3)
        assert cache.exact_hits == hits


def test_wrong_values_are_named() -> None:
    for make, match in [
        (lambda: ResponseCache(0), "size is 0"),
        (lambda: ResponseCache(similar=1.5), "similar is 1.5"),
        (lambda: ResponseCache(encoder=len), "encoder is given and similar is None"),
        (lambda: InferenceEngine(ToyModel(), response_cache=0), "response_cache is 0; it must be a ResponseCache"),
    ]:
        with pytest.raises(ConfigError, match=match):
            make()
    with InferenceEngine(ToyModel(), response_cache=3) as engine:
        assert engine.complete([5]).cached is None and engine.complete([5]).cached is not None


SYSTEM = {"role": "system", "content": "Be short."}


def ask(text: str, *before: dict[str, str]) -> list[dict[str, str]]:
    return [*before, {"role": "user", "content": text}]


def test_similar_questions_share_an_answer_where_that_is_asked_for(smollm2: Path) -> None:
    cache = ResponseCache(similar=0.9)
    with InferenceEngine.from_pretrained(smollm2, context_length=512, response_cache=cache) as engine:
        first = engine.chat(ask("What is the capital of France?", SYSTEM), max_new_tokens=8)
        again = engine.chat(ask("what's the capital of france", SYSTEM), max_new_tokens=8)
        assert again.text == first.text and again.cached is not None
        assert (again.cached.kind, again.cached.prompt) == ("similar", "What is the capital of France?")
        assert cache.similar_hits == 1
        for messages, config in [
            (ask("What is the capital of Francia?", SYSTEM), {}),
            (ask("what's the capital of france"), {}),
            (ask("what's the capital of france", SYSTEM), {"tenant": "another"}),
            (ask("what's the capital of france", SYSTEM), {"temperature": 0.5, "seed": 1}),
            (ask("what's the capital of france", SYSTEM), {"repetition_penalty": 1.2}),
        ]:
            assert engine.chat(messages, **{"max_new_tokens": 8, **config}).cached is None
        assert engine.complete("what's the capital of france", max_new_tokens=2).cached is None


def test_an_encoder_measures_what_the_guard_lets_through(smollm2: Path) -> None:
    cache = ResponseCache(similar=0.5, encoder=lambda text: [1.0, float("blue" in text)])
    with InferenceEngine.from_pretrained(smollm2, context_length=512, response_cache=cache) as engine:
        engine.chat(ask("Why is the sky blue?"), max_new_tokens=3)
        near = engine.chat(ask("What makes the sky look blue?"), max_new_tokens=3)
        assert near.cached is not None and near.cached.similarity == pytest.approx(1)
        assert engine.chat(ask("Why is the sky not blue?"), max_new_tokens=3).cached is None
