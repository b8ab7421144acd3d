"""Configs of other kinds, a dict of fields or transformers' GenerationConfig, mean what they mean there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from mnemos.decoding.config import GenerationConfig, as_config, choose_config
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from tests.engine.toys import ToyModel, toy_greedy

PROMPT = [5, 6, 7]


def test_a_dict_holds_the_fields() -> None:
    assert as_config({"max_tokens": 3, "temperature": 0.5}) == GenerationConfig(max_new_tokens=3, temperature=0.5)
    with pytest.raises(ConfigError, match="temprature is not a field .* did you mean temperature"):
        as_config({"temprature": 1})
    with pytest.raises(ConfigError, match="config is of type int; give a GenerationConfig, or a dict of its fields"):
        as_config(3)  # type: ignore[arg-type]


def test_a_dict_is_taken_wherever_a_config_is() -> None:
    expected = toy_greedy(PROMPT, 4)
    config = {"max_new_tokens": 4}
    with InferenceEngine(ToyModel(), generation_config=config) as engine:
        assert engine.complete(PROMPT).token_ids == expected
    with InferenceEngine(ToyModel()) as engine:
        assert engine.generate(PROMPT, config=config) == PROMPT + expected
        assert engine.generate(PROMPT, config) == [PROMPT + expected]
        assert engine.generate(PROMPT, generation_config=config) == PROMPT + expected
        assert engine.complete(PROMPT, config).token_ids == expected
        assert engine.submit(PROMPT, config).result().token_ids == expected
        assert [token.token_id for token in engine.stream(PROMPT, generation_config=config)] == expected
        assert engine.generate_batched([PROMPT] * 2, config=config) == [PROMPT + expected] * 2
        assert engine.generate_batched([PROMPT], generation_config=config) == [PROMPT + expected]
        assert engine.generate_batched([PROMPT], config=[config]) == [PROMPT + expected]
        assert engine.complete(PROMPT, config, max_new_tokens=2).token_ids == expected[:2]
    with pytest.raises(ConfigError, match="two names of one thing"):
        choose_config(config, None, generation_config=config)


class TestTransformers:
    @pytest.fixture
    def make(self) -> Any:
        return pytest.importorskip("transformers").GenerationConfig

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ({}, {"do_sample": False}),
            ({"temperature": 0.5}, {"do_sample": False, "temperature": 0.5}),  # not drawn without do_sample
            ({"do_sample": True}, {"do_sample": True, "top_k": 50}),
            ({"do_sample": True, "top_k": 7, "top_p": 0.8}, {"do_sample": True, "top_k": 7, "top_p": 0.8}),
            ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": False, "num_beams": 3, "n": 2}),
            ({"max_new_tokens": 5, "max_length": 9}, {"do_sample": False, "max_new_tokens": 5}),
            ({"max_length": 30, "min_length": 8}, {"do_sample": False, "max_length": 30, "min_length": 8}),
            ({"stop_strings": ["a", "b"]}, {"do_sample": False, "stop": ["a", "b"]}),
            (
                {"eos_token_id": [1, 2], "pad_token_id": 0},
                {"do_sample": False, "eos_token_id": [1, 2], "pad_token_id": 0},
            ),
            ({"sequence_bias": [[[1, 2], -3.0]]}, {"do_sample": False, "sequence_bias": {(1, 2): -3.0}}),
            ({"prompt_lookup_num_tokens": 4}, {"do_sample": False, "speculative": "prompt_lookup", "draft_tokens": 4}),
            ({"use_cache": True, "cache_implementation": "static", "output_scores": False}, {"do_sample": False}),
        ],
        ids=lambda fields: "-".join(fields) or "none",
    )
    def test_its_values(self, make: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        expected = GenerationConfig(**ours)
        assert as_config(make(**theirs)) == expected
        assert as_config(make(**theirs).to_dict()) == expected  # as it is saved

    def test_what_has_no_equivalent_is_named(self, make: Any) -> None:
        with pytest.raises(ConfigError, match="renormalize_logits is True in transformers.*leave it out"):
            as_config(make(renormalize_logits=True))
        with pytest.warns(UserWarning, match="without effect here: chat_format"):
            as_config(make(chat_format="chatml"))

    def test_a_model_s_own_config_is_taken(self, make: Any) -> None:
        pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        config.decoder_start_token_id = 0
        module = transformers.T5ForConditionalGeneration(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert as_config(module.generation_config).eos_ids == (1,)

    def test_its_texts(self, make: Any) -> None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(1)
        sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}
        module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        config = make(max_length=20, min_length=15, repetition_penalty=1.4, num_beams=2, eos_token_id=3, pad_token_id=0)
        ids = torch.tensor([PROMPT])
        with InferenceEngine(module) as engine:
            assert torch.equal(engine.generate(ids, generation_config=config), module.generate(ids, config))
