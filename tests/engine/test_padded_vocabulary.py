"""Ids for which the model has rows but the tokenizer has no tokens are never chosen, by any method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.contract import Batch, Output
from mnemos.decoding.choice import Cutoffs, sample
from mnemos.decoding.seeds import uniform
from mnemos.engine.engine import InferenceEngine
from tests.engine.toys import VOCABULARY, LetterTokenizer, StateToy, ToyModel, toy_row

KNOWN = 60
PROMPT = [5, 6, 7, 8]


class FewLetters(LetterTokenizer):
    """Fewer letters than the model has rows."""

    vocabulary_size = KNOWN


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), FewLetters(), cache_tokens=4000) as made:
        yield made


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(toy_row(tokens, len(tokens) - 1)[0][:KNOWN].argmax()))
    return tokens[len(prompt) :]


def test_the_most_probable_known_token_is_chosen(engine: InferenceEngine) -> None:
    prompts = [[number, 3] for number in range(1, 20)]
    expected = [greedy(prompt, 30) for prompt in prompts]
    assert [completion.token_ids for completion in engine.complete(prompts, max_new_tokens=30)] == expected
    assert engine.complete(prompts[0], max_new_tokens=30, logprobs=1).token_ids == expected[0]
    assert engine.complete(prompts[0], max_new_tokens=30, speculative="prompt_lookup").token_ids == expected[0]
    everything = [toy_row(prompt, 1)[0].argmax() for prompt in prompts]
    assert any(token >= KNOWN for token in everything)  # the model prefers such ids


def test_draws_are_those_among_the_known_tokens(engine: InferenceEngine) -> None:
    cutoffs = Cutoffs(temperature=3.0, top_p=0.9)
    prompts = [[number, 3] for number in range(1, 9)]
    completions = engine.complete(prompts, max_new_tokens=20, temperature=3.0, top_p=0.9, seed=4)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for _ in range(20):
            row = toy_row(tokens, len(tokens) - 1)[0][:KNOWN].copy()
            tokens.append(sample(row, cutoffs, uniform(4, len(tokens))))
        assert completion.token_ids == tokens[2:]


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "n": 4},
        {"num_beams": 4, "n": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "do_sample": True, "temperature": 5.0, "top_p": 0.5, "seed": 1},
        {"penalty_alpha": 0.6, "top_k": 5},
        {"n": 5, "temperature": 8.0, "seed": 3},
        {"temperature": 8.0, "seed": 3, "typical_p": 0.5},
        {"temperature": 8.0, "seed": 3, "mirostat": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"temperature": 8.0, "seed": 3, "logit_bias": {VOCABULARY - 1: 50.0}},
    ],
    ids=str,
)
def test_no_strategy_chooses_another(engine: InferenceEngine, how: dict[str, Any]) -> None:
    prompt = [*PROMPT, VOCABULARY - 1]  # which may still contain such ids
    choices = engine.complete(prompt, max_new_tokens=30, ignore_eos=True, **how).choices
    assert all(len(choice.token_ids) == 30 and max(choice.token_ids) < KNOWN for choice in choices)


def test_what_is_named_to_be_chosen_or_to_end_texts_is_known(engine: InferenceEngine) -> None:
    last = VOCABULARY - 1
    assert engine.complete(PROMPT, max_new_tokens=2, allowed_token_ids=[last]).token_ids == [last] * 2
    assert engine.complete(PROMPT, logit_bias={last: 99.0}, stop_token_ids=[last]).choices[0].stopped_by == last
    forced = engine.complete(PROMPT, max_new_tokens=3, forced_eos_token_id=last)
    assert forced.token_ids == [*greedy(PROMPT, 2), last]


def test_logits_and_scores_keep_all_columns(engine: InferenceEngine) -> None:
    logits = engine.logits(PROMPT)
    assert logits.shape == (4, VOCABULARY)
    np.testing.assert_array_equal(logits, [toy_row(PROMPT[: end + 1], end)[0] for end in range(4)])
    assert engine.score([[5, VOCABULARY - 1]])[0].logprobs.shape == (1,)


class SelfChoosing(StateToy):
    """Finds the most probable tokens by itself."""

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        if not batch.greedy:
            return output
        return Output(output.logits[:, :0], output.hidden, output.logits.argmax(axis=1).astype(np.int32))


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_model_that_chooses_is_run_for_its_logits_at_most_once_more(rewinds: bool) -> None:
    with InferenceEngine(SelfChoosing(rewinds=rewinds), FewLetters()) as engine:
        assert engine.complete(PROMPT, max_new_tokens=40).token_ids == greedy(PROMPT, 40)


def test_a_padded_checkpoint_chooses_known_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.models.load import load_model
    from tests.models.checkpoints import CONFIGS, build, token_ids

    build(CONFIGS["llama"](), tmp_path)
    model = load_model(open_checkpoint(tmp_path), dtype="float32")
    prompts = [token_ids(9, seed=seed) for seed in range(12)]
    with InferenceEngine(model, FewLetters()) as engine:
        together = engine.complete(prompts, max_new_tokens=12, ignore_eos=True)
        for prompt, completion in zip(prompts, together, strict=True):
            logits = engine.logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
            assert logits.shape[1] > KNOWN
            assert completion.token_ids == logits[:, :KNOWN].argmax(axis=1).tolist()
        assert any(engine.logits(prompt)[-1].argmax() >= KNOWN for prompt in prompts)
