"""A config is either meaningful or refused with the field, the value and the rule."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.fields import ALIASES, RULES
from mnemos.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "mode", "samples"),
    [
        ({}, "greedy", False),
        ({"strategy": "greedy", "max_length": 100}, "greedy", False),
        ({"temperature": 0}, "greedy", False),
        ({"temperature": 0, "top_p": 0.9}, "greedy", False),
        ({"seed": 3, "top_p": 1.0, "num_beams": 1}, "greedy", False),
        ({"temperature": 1.0}, "sampling", True),
        ({"top_p": 0.9}, "sampling", True),
        ({"do_sample": True}, "sampling", True),
        ({"strategy": "sampling", "temperature": 0.8, "top_k": 50, "top_p": 0.95, "do_sample": True}, "sampling", True),
        ({"strategy": "nucleus"}, "sampling", True),
        ({"num_beams": 4}, "beam", False),
        ({"strategy": "beam_search", "num_beams": 5, "length_penalty": 1.2, "early_stopping": True}, "beam", False),
        ({"num_beams": 4, "do_sample": True, "top_p": 0.9}, "beam", True),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.8}, "beam", False),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive", False),
        ({"strategy": "contrastive"}, "contrastive", False),
    ],
)
def test_the_kind_of_decoding_follows_from_what_is_given(given, mode, samples):
    config = GenerationConfig(**given)
    assert (config.mode, config.samples) == (mode, samples)


def test_strategies_named_after_a_parameter_set_it():
    assert GenerationConfig(strategy="top_k").top_k == 50
    assert GenerationConfig(strategy="top_p").top_p == GenerationConfig(strategy="nucleus").top_p == 0.9
    assert GenerationConfig(strategy="top_k", top_k=7).top_k == 7
    assert GenerationConfig(strategy="beam_search").beams == 4


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"top_k": -1, "temperature": 0.7}, {"temperature": 0.7}),  # vLLM, llama.cpp: off
        ({"seed": -1}, {}),  # vLLM, llama.cpp: a random one
        ({"logprobs": True}, {"logprobs": 0}),  # OpenAI's chats
        ({"logprobs": False}, {}),
    ],
)
def test_special_values_of_other_libraries_are_taken_with_their_meaning(given, meant):
    assert GenerationConfig(**given) == GenerationConfig(**meant)


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True, "temperature": 0},
        {"strategy": "sampling", "temperature": 0.0, "top_p": 0.5},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "top_k": 20},  # as Hugging Face does it
        {"temperature": 0, "n": 2},  # OpenAI: two equal results
    ],
)
def test_the_most_probable_token_asked_for_outright_is_taken_whatever_else_is_given(given):
    config = GenerationConfig(**given)
    assert (config.mode, config.samples) == ("greedy", False)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("use_cache", "always cached"),
        ("response_format", "json_schema"),
        ("num_predict", "max_new_tokens"),
        ("renormalize_logits", "leave it out"),
        ("echo", "generated text only"),
        ("strem", "the fields are"),
    ],
)
def test_hints_for_other_libraries_options_do_not_mislead(name, hint):
    with pytest.raises(ConfigError, match=hint):
        GenerationConfig(**{name: 1})


NOVA_DEFAULTS = {
    "max_length": 512, "min_length": 1, "temperature": 1.0, "do_sample": False, "num_beams": 1, "length_penalty": 1.0,
    "early_stopping": False, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_return_sequences": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        ("greedy", "greedy"),
        ("beam_search", "beam"),
        *((name, "sampling") for name in ("sampling", "top_k", "top_p", "nucleus")),
    ],
)
def test_another_librarys_defaults_beside_a_named_strategy_are_no_contradiction(strategy: str, mode: str):
    config = GenerationConfig(strategy=strategy, **NOVA_DEFAULTS)
    assert (config.mode, config.samples) == (mode, mode == "sampling")
    if mode != "sampling":
        assert GenerationConfig(strategy=strategy, top_k=50, top_p=0.9).mode == mode
        assert not GenerationConfig(**{**NOVA_DEFAULTS, "num_beams": 3, "top_p": 0.9}).samples


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_beams": 4, "top_p": 0.9}, "top_p"),
        ({"strategy": "greedy", "top_k": 5}, "top_k"),
        ({"do_sample": True, "temperature": 0, "num_beams": 2}, "temperature"),
        ({"strategy": "greedy", "do_sample": True}, "do_sample"),
        ({"strategy": "greedy", "top_p": 0.8}, "top_p"),
        ({"strategy": "greedy", "num_beams": 5}, "num_beams"),
        ({"strategy": "beam_search", "top_k": 40}, "top_k"),
        ({"penalty_alpha": 0.6, "num_beams": 4}, "penalty_alpha"),
        ({"strategy": "contrastive", "num_beams": 4}, "num_beams"),
        ({"penalty_alpha": 0.6, "do_sample": True}, "do_sample"),
        ({"penalty_alpha": 0.6, "top_k": 1}, "top_k"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty"),
        ({"num_beams": 4, "num_beam_groups": 2, "do_sample": True}, "num_beam_groups"),
        ({"num_beams": 2, "n": 3}, "num_return_sequences"),
        ({"n": 2}, "num_return_sequences"),
        ({"n": 2, "num_return_sequences": 3}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"temperature": 1.0, "n": 3, "best_of": 2}, "best_of"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"speculative": "prompt_lookup", "num_beams": 2}, "speculative"),
        ({"draft_tokens": 4}, "draft_tokens"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens"),
        ({"max_length": 4, "min_length": 5}, "min_length"),
        ({"num_beams": 2, "overflow": "sliding"}, "overflow"),
        ({"num_beams": 2, "stop_when_repeating": True}, "stop_when_repeating"),
    ],
)
def test_contradictions_are_refused(given, field):
    with pytest.raises(ConfigError, match=rf"^{field} is "):
        GenerationConfig(**given)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "temperature": [-1, math.nan, math.inf, 1e9, 1e-20, "1", True, 10**400],
        "top_p": [-0.1, 1.1, math.nan, True],
        "top_k": [-2, 2.0, True, 2**40, "5"],
        "max_new_tokens": [0, -5, 1.5, True, 2**31, math.inf],
        "repetition_penalty": [0, -1, math.nan, 1e9],
        "presence_penalty": [3, math.nan],
        "seed": [-2, 2**64, 1.0],
        "stop": ["", [""], 5, [5], ["x"] * 257, b"x"],
        "eos_token_id": [-1, [1, -2], True, 1.5],
        "bad_words_ids": [[[]], [1], "x", [[-1]]],
        "logit_bias": [{"x": 1}, {1: math.nan}, {1: 101}, {-1: 1}, [1]],
        "num_beams": [0, -1, 1000, True],
        "early_stopping": ["always", 1],
        "n": [0, -1, True, 5000],
        "json_schema": ["{", "5", 5, {"a": {1, 2}}, {"a": math.nan}],
        "regex": ["", 5],
        "choice": [[], "yes", [""], [1]],
        "logits_processors": [5, ["x"]],
        "stopping_criteria": [5],
        "max_time": [0, -1, math.inf],
        "strategy": ["dreaming", 5],
        "overflow": ["wrap"],
        "speculative": ["magic", True],
        "tenant": ["", 5],
        "logprobs": [-1, 1.0, 101],
    }.items(),
)
def test_values_outside_their_meaning_are_refused(field, values):
    for value in values:
        with pytest.raises(ConfigError) as caught:
            GenerationConfig(**{field: value})
        name = ALIASES.get(field, field)
        assert str(caught.value).startswith(f"{name} is ")
        assert "it must be" in str(caught.value)
        assert len(str(caught.value)) < 400


def test_unknown_fields_name_the_nearest_known_one():
    with pytest.raises(ConfigError, match="tempratur is not a field .* did you mean temperature"):
        GenerationConfig(tempratur=0.5)
    with pytest.raises(ConfigError, match="the fields are"):
        GenerationConfig(zzzzzz=1)
    with pytest.raises(ConfigError, match="without a name"):
        GenerationConfig("greedy")
    with pytest.raises(ConfigError, match="did you mean max_new_tokens"):
        GenerationConfig().with_overrides(max_new_token=5)


def test_values_take_their_normal_form_and_none_is_the_default():
    config = GenerationConfig(
        stop="x", eos_token_id=np.int64(5), logit_bias={"7": 1}, temperature=np.float32(0.5), bad_words_ids=[[1, 2]]
    )
    assert config.stop == ("x",)
    assert config.eos_ids == (5,)
    assert config.logit_bias == {7: 1.0}
    assert config.temperature == 0.5 and type(config.temperature) is float
    assert config.bad_words_ids == ((1, 2),)
    assert GenerationConfig(**dict.fromkeys(RULES), **dict.fromkeys(ALIASES)) == GenerationConfig()


def test_overrides_aliases_copies():
    config = GenerationConfig(n=3, temperature=1.0, max_tokens=9)
    assert (config.num_return_sequences, config.max_new_tokens) == (3, 9)
    assert config.with_overrides(n=4).num_return_sequences == 4
    assert config.with_overrides(num_return_sequences=5).n == 5
    assert config.with_overrides(seed=1) == GenerationConfig(n=3, temperature=1.0, max_tokens=9, seed=1)
    with pytest.raises(ConfigError):
        config.with_overrides(strategy="greedy")
    assert copy.copy(config) == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(AttributeError):
        config.seed = 5


numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-3, 300),
    st.floats(),
    st.floats(0, 2),
    st.booleans(),
    st.sampled_from([np.float32(0.5), np.int32(3), np.float64("nan"), 1j]),
)
anything = st.one_of(
    st.none(),
    numbers,
    st.text(max_size=9),
    st.binary(max_size=4),
    st.sampled_from(["greedy", "beam_search", "top_p", "never", "prompt_lookup", "sliding", len]),
    st.lists(st.one_of(numbers, st.text(max_size=4), st.lists(numbers, max_size=3)), max_size=4),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), numbers, max_size=3),
    st.builds(object),
)


@given(st.dictionaries(st.sampled_from([*RULES, *ALIASES]), anything, max_size=4))
def test_any_values_give_a_valid_config_or_an_error_that_names_a_field(given):
    try:
        config = GenerationConfig(**given)
    except ConfigError as error:
        named = {*given, *(ALIASES.get(name, name) for name in given)}
        assert any(str(error).startswith(f"{name} is ") for name in named), error
    else:
        assert config.mode in ("greedy", "sampling", "beam", "contrastive")
        assert config.with_overrides() == config


def test_a_pydantic_model_is_its_schema() -> None:
    class Person:
        """What a class of pydantic's has."""

        @classmethod
        def model_json_schema(cls) -> dict[str, object]:
            return {"type": "object", "properties": {"age": {"type": "integer"}}}

    assert GenerationConfig(json_schema=Person).json_schema == Person.model_json_schema()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="json_schema is .*; it must be a JSON schema: a dict, a pydantic model"):
        GenerationConfig(json_schema=int)  # type: ignore[arg-type]
