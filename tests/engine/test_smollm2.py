"""The engine on the real model: results alongside others, in chunks or from the cache equal those alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine

QUESTION = [{"role": "user", "content": "Name three colours of the rainbow."}]
STORY = "Once upon a time there was a small village by the sea, where every morning the fishermen went out. " * 6


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, cache_tokens=8192, max_batch_tokens=128) as made:
        yield made


def encode(engine: InferenceEngine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)


def test_a_streamed_answer_is_the_completion(engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode_chat(QUESTION)
    completion = engine.complete(prompt, max_new_tokens=40)
    streamed = list(engine.stream(prompt, max_new_tokens=40))
    assert "".join(token.text for token in streamed) == completion.text
    assert [token.token_id for token in streamed] == completion.token_ids
    assert "red" in completion.text.lower()
    assert streamed[-1].finish_reason == completion.finish_reason


def test_beside_others_as_alone(engine: InferenceEngine) -> None:
    prompts = [encode(engine, text) for text in ("The sea", "def add(a, b):", STORY, "1, 2, 3,", "Paris is")]
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 7}
    alone = [engine.complete(prompt, cache_salt=f"alone {i}", **options).token_ids for i, prompt in enumerate(prompts)]
    together = [completion.token_ids for completion in engine.complete(prompts, cache_salt="together", **options)]
    assert together == alone


def test_from_the_cache_as_anew(engine: InferenceEngine) -> None:
    prompt = encode(engine, STORY)
    first = engine.complete(prompt, max_new_tokens=8, cache_salt="prefix", logprobs=0)
    second = engine.complete(prompt, max_new_tokens=8, cache_salt="prefix", logprobs=0)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= len(prompt) - 32
    assert second.logprobs == first.logprobs  # bit by bit


def test_scores_are_those_of_the_logits(engine: InferenceEngine) -> None:
    tokens = encode(engine, STORY)
    (score,) = engine.score([tokens])
    logits = engine.logits(tokens).astype("float64")
    normal = logits - logits.max(axis=1, keepdims=True)
    normal -= np.log(np.exp(normal).sum(axis=1, keepdims=True))
    assert score.logprobs == pytest.approx(normal[range(len(tokens) - 1), tokens[1:]], abs=1e-4)
    assert 1 < score.perplexity < 100


def test_preempted_as_undisturbed(smollm2: Path, engine: InferenceEngine) -> None:
    prompts = [encode(engine, text) for text in (STORY[:150], STORY[100:300], STORY[:90])]
    expected = [completion.token_ids for completion in engine.complete(prompts, max_new_tokens=40, ignore_eos=True)]
    with InferenceEngine.from_pretrained(smollm2, cache_tokens=160, prefix_cache=False) as small:
        completions = small.complete(prompts, max_new_tokens=40, ignore_eos=True)
        assert small.stats().preemptions > 0
    assert [completion.token_ids for completion in completions] == expected
