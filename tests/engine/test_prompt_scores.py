"""Log probabilities of prompts: exact whatever else runs and whatever is cached, and no change to the text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mnemos.decoding.forced import CHUNK
from mnemos.decoding.prompt_scores import ScoredToken
from mnemos.engine.completion import Completion
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, ContextLengthError
from tests.engine.toys import VOCABULARY, ToyModel, toy_greedy, toy_row

LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 200]
PROMPT = [int(token) for token in np.random.default_rng(5).integers(1, VOCABULARY, 200)]


def expected(prompt: list[int], count: int) -> list[ScoredToken]:
    """By the definition: the log softmax of the row before each token."""
    scores = [ScoredToken(prompt[0], None)]
    for place in range(1, len(prompt)):
        row = toy_row(prompt[:place], place - 1)[0].astype(np.float64)
        logprobs = row - np.log(np.exp(row).sum())
        best = sorted(range(VOCABULARY), key=lambda token: (-row[token], token))[:count]
        top = tuple((token, float(logprobs[token])) for token in best)
        scores.append(ScoredToken(prompt[place], float(logprobs[prompt[place]]), top))
    return scores


def check(scores: list[ScoredToken], prompt: list[int], count: int) -> None:
    wanted = expected(prompt, count)
    assert [token.token_id for token in scores] == prompt
    assert scores[0] == (prompt[0], None, ())
    for got, want in zip(scores[1:], wanted[1:], strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert [token for token, _ in got.top_logprobs] == [token for token, _ in want.top_logprobs]
        assert [p for _, p in got.top_logprobs] == pytest.approx([p for _, p in want.top_logprobs], abs=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_each_token_has_its_log_softmax_and_the_text_stays(engine: InferenceEngine, length: int) -> None:
    prompt = PROMPT[:length]
    completion = engine.complete(prompt, max_new_tokens=5, prompt_logprobs=3)
    check(completion.prompt_logprobs, prompt, 3)
    assert completion.token_ids == toy_greedy(prompt, 5)
    assert completion.usage.cached_tokens == 0


def test_a_cached_prompt_is_scored_all_the_same(engine: InferenceEngine) -> None:
    engine.complete(PROMPT, max_new_tokens=1)
    fresh = engine.complete(PROMPT, max_new_tokens=5, prompt_logprobs=0)
    check(fresh.prompt_logprobs, PROMPT, 0)
    assert engine.complete(PROMPT, max_new_tokens=1).usage.cached_tokens > 0


def test_many_at_once_have_the_bits_of_each_alone(engine: InferenceEngine) -> None:
    prompts = [PROMPT[start : start + 30 + 20 * start] for start in range(7)]
    alone = [engine.complete(prompt, max_new_tokens=3, prompt_logprobs=2).prompt_logprobs for prompt in prompts]
    with InferenceEngine(ToyModel(), cache_tokens=400, max_batch_tokens=50) as narrow:  # chunks, and preemption
        together = narrow.complete(prompts, max_new_tokens=3, prompt_logprobs=2)
    assert [one.prompt_logprobs for one in together] == alone


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 4, "n": 3},
        {"temperature": 1.0, "seed": 4, "best_of": 4},
        {"num_beams": 3, "n": 2},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"speculative": "prompt_lookup"},
        {"repetition_penalty": 1.3, "logprobs": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_kind_of_decoding_continues_as_without(engine: InferenceEngine, fields: dict[str, object]) -> None:
    plain = engine.complete(PROMPT, max_new_tokens=8, **fields)
    scored = engine.complete(PROMPT, max_new_tokens=8, prompt_logprobs=1, **fields)
    assert scored.choices == plain.choices
    check(scored.prompt_logprobs, PROMPT, 1)


def test_they_are_those_of_score_and_of_the_text_that_followed(engine: InferenceEngine) -> None:
    first = engine.complete(PROMPT[:20], max_new_tokens=30, logprobs=1)
    whole = PROMPT[:20] + first.token_ids
    again = engine.complete(whole, max_new_tokens=1, prompt_logprobs=1).prompt_logprobs
    assert [token.logprob for token in again[20:]] == first.logprobs
    assert [token.top_logprobs for token in again[20:]] == first.choices[0].top_logprobs
    assert [token.logprob for token in again[1:]] == engine.score([whole])[0].logprobs.tolist()


class TestPromptAlone:
    def test_no_new_token_is_generated(self, engine: InferenceEngine) -> None:
        completion = engine.complete(PROMPT, max_new_tokens=0, prompt_logprobs=0, n=2, temperature=1.0)
        check(completion.prompt_logprobs, PROMPT, 0)
        assert [(one.token_ids, one.finish_reason) for one in completion.choices] == [([], "length")] * 2

    def test_the_prompt_may_fill_the_context(self, engine: InferenceEngine) -> None:
        whole = (PROMPT * 2)[:256]
        check(engine.complete(whole, max_new_tokens=0, prompt_logprobs=0).prompt_logprobs, whole, 0)
        with pytest.raises(ContextLengthError, match="257 tokens, 1 more than fit into the context of 256"):
            engine.complete([*whole, 1], max_new_tokens=0, prompt_logprobs=0)

    def test_without_scores_there_is_nothing_to_do(self, engine: InferenceEngine) -> None:
        with pytest.raises(ConfigError, match="max_new_tokens is 0 .* to score a prompt alone, set prompt_logprobs"):
            engine.complete(PROMPT, max_new_tokens=0)


def test_a_stream_has_them_before_its_first_token(engine: InferenceEngine) -> None:
    handle = engine.submit(PROMPT, max_new_tokens=4, prompt_logprobs=0)
    next(iter(handle))
    check(handle.prompt_logprobs, PROMPT, 0)


def test_they_are_in_the_json(engine: InferenceEngine) -> None:
    completion: Completion = engine.complete(PROMPT[:3], max_new_tokens=1, prompt_logprobs=1)
    read = json.loads(completion.to_json())["prompt_logprobs"]
    assert read[0] == {"token_id": PROMPT[0], "logprob": None, "top_logprobs": []}
    assert read[1]["logprob"] == completion.prompt_logprobs[1].logprob


def test_an_endless_text_is_refused(engine: InferenceEngine) -> None:
    with pytest.raises(ConfigError, match="prompt_logprobs is 0 .* an endless text drops tokens"):
        engine.complete(PROMPT, overflow="sliding", prompt_logprobs=0)
