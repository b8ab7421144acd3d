"""Classifier-free guidance: the values and texts of transformers, with every kind of decoding that allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.guidance import guide
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, ContextLengthError, RequestError, UnsupportedError
from tests.decoding.driver import Run, ToyModel, drive, generate, random_model, spec
from tests.engine.toys import LetterTokenizer, ReaderToy, toy_row
from tests.engine.toys import ToyModel as EngineToy

SIZE = 40
PROMPT, NEGATIVE = [1, 2, 3, 4], [9, 8, 7]
SCALE = 2.5


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def guided_row(model: ToyModel, text: Sequence[int], negative: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """By the paper's formula, in log probabilities."""
    row, hidden = model(text)
    away = log_softmax(model([*negative, *text[len(PROMPT) :]])[0])
    return (away + SCALE * (log_softmax(row) - away)).astype(np.float32), hidden


def compare(model: ToyModel, negative: Sequence[int], fields: dict[str, Any]) -> Run:
    """A guided run and the same strategy over guided rows are the same."""
    config = GenerationConfig(guidance_scale=SCALE, negative_prompt=negative, max_new_tokens=12, **fields)
    guided = drive(make_strategy(config, PROMPT, None, spec(SIZE, eos=(5,))), PROMPT, model)
    plain = generate(
        PROMPT, lambda text: guided_row(model, text, negative), spec(SIZE, eos=(5,)), max_new_tokens=12, **fields
    )
    assert [one.tokens for one in guided.finished] == [one.tokens for one in plain.finished]
    return guided


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": 3, "n": 4},
        {"temperature": 1.0, "seed": 3, "best_of": 4, "n": 2},
        {"num_beams": 4, "n": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.4},
        {"num_beams": 3, "do_sample": True, "seed": 1},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[11], [12, 13]]},
        {"speculative": "prompt_lookup", "draft_tokens": 4},
    ],
    ids=lambda fields: "-".join(fields) or "greedy",
)
@pytest.mark.parametrize("negative", [NEGATIVE, [6], list(range(20))], ids=len)
def test_a_strategy_sees_guided_rows(fields: dict[str, Any], negative: list[int]) -> None:
    for seed in range(3):
        compare(random_model(SIZE, seed), negative, fields)


def test_drafts_of_guided_texts_are_accepted() -> None:
    repeats = random_model(SIZE, 1, order=1)  # falls into a loop, which is then guessed
    assert compare(repeats, NEGATIVE, {"speculative": "prompt_lookup", "ignore_eos": True}).accepted > 0


def test_without_a_negative_prompt_the_last_token_is_it() -> None:
    model = random_model(SIZE)
    given, default = (
        generate(PROMPT, model, spec(SIZE), guidance_scale=SCALE, max_new_tokens=9, **own)
        for own in ({"negative_prompt": PROMPT[-1:]}, {})
    )
    assert given.tokens == default.tokens


def test_a_scale_of_1_is_no_guidance() -> None:
    model = random_model(SIZE)
    plain = generate(PROMPT, model, spec(SIZE), max_new_tokens=9)
    same = generate(PROMPT, model, spec(SIZE), max_new_tokens=9, guidance_scale=1)
    assert (same.tokens, same.rows) == (plain.tokens, plain.rows)


def test_impossible_tokens_stay_impossible() -> None:
    nothing = -np.inf
    rows = guide(
        np.array([[0, nothing, 1, nothing]], np.float32), np.array([[0, 1, nothing, nothing]], np.float32), 3.0
    )
    assert np.isneginf(rows[0, [1, 3]]).all() and np.isfinite(rows[0, [0, 2]]).all()


FIELDS: dict[str, Any] = {"guidance_scale": SCALE, "negative_prompt": NEGATIVE}


class TestInTheEngine:
    def by_hand(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            away = [*NEGATIVE, *tokens[len(prompt) :]]
            one, other = (log_softmax(toy_row(text, len(text) - 1)[0]) for text in (tokens, away))
            tokens.append(int((other + SCALE * (one - other)).argmax()))
        return tokens[len(prompt) :]

    def test_batched_streamed_cached_and_preempted(self) -> None:
        prompts = [[5 + length, *range(1, length)] for length in range(3, 43, 4)]
        expected = [self.by_hand(prompt, 15) for prompt in prompts]
        with InferenceEngine(EngineToy(), cache_tokens=280, max_batch_tokens=20) as engine:
            for _ in range(2):
                handles = [engine.submit(prompt, max_new_tokens=15, **FIELDS) for prompt in prompts]
                assert [handle.result().token_ids for handle in handles] == expected
            assert engine.stats().preemptions > 0
            assert [token.token_id for token in engine.stream(prompts[0], max_new_tokens=15, **FIELDS)] == expected[0]
            usage = engine.complete(prompts[0] * 3, max_new_tokens=15, **FIELDS).usage
            assert usage.cached_tokens <= usage.prompt_tokens

    def test_with_scores_of_the_prompt(self) -> None:
        with InferenceEngine(EngineToy(), cache_tokens=4000) as engine:
            prompt = [1 + place % 80 for place in range(200)]
            plain = engine.complete(prompt, max_new_tokens=5, prompt_logprobs=1)
            guided = engine.complete(prompt, max_new_tokens=5, prompt_logprobs=1, **FIELDS)
            assert guided.prompt_logprobs == plain.prompt_logprobs
            assert guided.token_ids == self.by_hand(prompt, 5)

    def test_a_text_as_the_negative_prompt(self) -> None:
        with InferenceEngine(EngineToy(), LetterTokenizer(), cache_tokens=4000) as engine:  # type: ignore[arg-type]
            text = LetterTokenizer().decode(NEGATIVE)
            texts = [engine.complete([1, 2], guidance_scale=2.0, negative_prompt=p).text for p in (text, NEGATIVE)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"negative_prompt": [1]}, ConfigError, "needs a guidance_scale"),
        ({"guidance_scale": 2, "penalty_alpha": 0.6, "top_k": 4}, ConfigError, "contrastive search compares"),
        ({"guidance_scale": 2, "speculative": "draft"}, ConfigError, "prompt_lookup works"),
        ({"guidance_scale": 2, "overflow": "sliding"}, ConfigError, "cut in different places"),
        ({"guidance_scale": 2, "negative_prompt": ""}, ConfigError, "a non-empty string or a list of token ids"),
        ({"guidance_scale": 2, "negative_prompt": [999]}, RequestError, "negative_prompt has the token id 999"),
        ({"guidance_scale": 2, "negative_prompt": "no"}, RequestError, "negative_prompt needs a tokenizer"),
        ({"guidance_scale": 2, "negative_prompt": [1] * 250, "max_new_tokens": 7}, ContextLengthError, "250 tokens"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with InferenceEngine(EngineToy()) as engine, pytest.raises(error, match=message):
        engine.complete(PROMPT, **fields)


def test_the_length_fits_a_long_negative_prompt() -> None:
    with InferenceEngine(EngineToy()) as engine:
        assert len(engine.complete(PROMPT, guidance_scale=2, negative_prompt=[1] * 250).token_ids) == 6


def test_an_encoder_is_refused() -> None:
    with InferenceEngine(ReaderToy()) as engine, pytest.raises(UnsupportedError, match="guidance_scale is 2.0"):
        engine.complete(PROMPT, guidance_scale=2)


@pytest.mark.parametrize("negative", [[9, 8, 7, 6, 5], None], ids=["given", "default"])
@pytest.mark.parametrize("fields", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 20}], ids=lambda f: "-".join(f))
def test_the_texts_of_transformers(negative: list[int] | None, fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(8)
    given = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    expected = module.generate(
        torch.tensor([PROMPT]),
        guidance_scale=SCALE,
        do_sample=False,
        max_new_tokens=30,
        pad_token_id=0,
        **given,
        **fields,
    )
    with InferenceEngine(module) as engine:
        own = {} if negative is None else {"negative_prompt": negative}
        found = engine.generate(PROMPT, guidance_scale=SCALE, max_new_tokens=30, **own, **fields)
    assert found == expected[0].tolist()
