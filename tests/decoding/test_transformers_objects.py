"""Logits processors and stopping criteria of transformers, unchanged, with the results that they have there."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos import InferenceEngine  # noqa: E402
from mnemos.errors import RequestError  # noqa: E402

PROMPT = [1, 5, 9, 5, 7]


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


class OnlyEven(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
    """As users write them."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, 1::2] = float("-inf")
        return scores


class Fails(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        raise ValueError("out of cheese")


def processors() -> list[Any]:
    return [
        [transformers.RepetitionPenaltyLogitsProcessor(1.7)],
        transformers.LogitsProcessorList([transformers.NoRepeatNGramLogitsProcessor(2), OnlyEven()]),
        [transformers.SuppressTokensLogitsProcessor([3, 4], device="cpu")],
    ]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("beams", [1, 3])
def test_processors(module: Any, index: int, beams: int) -> None:
    given = processors()[index]
    ids = torch.tensor([PROMPT])
    theirs = module.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, num_beams=beams,
        logits_processor=transformers.LogitsProcessorList(processors()[index]),
    )  # fmt: skip
    with InferenceEngine(module) as engine:
        ours = engine.generate(ids, max_new_tokens=12, num_beams=beams, logits_processors=given)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_stopping_criteria(module: Any, beams: int) -> None:
    with InferenceEngine(module) as engine:
        given = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(9)])
        assert len(engine.generate(PROMPT, max_new_tokens=30, num_beams=beams, stopping_criteria=given)) == 9
        end = engine.generate(PROMPT, max_new_tokens=3)[-1]
        stopped = engine.complete(PROMPT, max_new_tokens=30, stopping_criteria=transformers.EosTokenCriteria(end))
        assert stopped.token_ids[-1] == end and len(stopped.token_ids) <= 3
        assert stopped.choices[0].finish_reason == "stop"


def test_an_error_in_one_is_named(module: Any) -> None:
    with InferenceEngine(module) as engine, pytest.raises(RequestError, match="Fails failed: ValueError: out of ch"):
        engine.generate(PROMPT, max_new_tokens=2, logits_processors=Fails())
