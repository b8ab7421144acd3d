"""Every field of GenerationConfig is on the command line, and becomes the value that Python would get."""

from __future__ import annotations

import argparse

import pytest

from mnemos.cli.generation import OPTIONS, add_generation_arguments, flag, generation_config
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.fields import FIELDS, GROUPS


def parser(results: bool = True) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_generation_arguments(made, results=results)
    return made


def config(*words: str) -> GenerationConfig:
    return generation_config(parser().parse_args(words))


def test_every_field_but_functions_is_an_option_in_its_group() -> None:
    assert {field.name for field in FIELDS} - {field.name for field in OPTIONS} == {
        "logits_processors",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "adapter",  # of a command that loads one model, --adapter names the folder
        "memory",  # and --memory is the engine's
    }
    text = parser().format_help()
    places = [text.index(f"\n{title}") for title in GROUPS.values()]
    assert places == sorted(places)
    assert all(f"\n  {flag(field)}" in text for field in OPTIONS)
    assert "--num-return-sequences" not in parser(results=False).format_help()


def test_without_options_everything_is_the_default() -> None:
    assert config() == GenerationConfig()


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("--strategy beam_search --num-beams 3 --early-stopping never", {"num_beams": 3, "early_stopping": "never"}),
        ("--num-beams 2 --early-stopping true", {"num_beams": 2, "early_stopping": True}),
        ("--max-length 90 --min-length 5", {"max_length": 90, "min_length": 5}),
        ("--do-sample --top-k -1 --seed -1", {"do_sample": True}),
        ("--no-do-sample", {"do_sample": False}),
        ("--stop-token-ids 5,7 --stop-token-ids 9", {"stop_token_ids": (5, 7, 9)}),
        ("--bad-words-ids 5,7 --bad-words-ids 9", {"bad_words_ids": ((5, 7), (9,))}),
        ("--bad-words a --bad-words b --choice c", {"bad_words": ("a", "b"), "choice": ("c",)}),
        ("--suppress-tokens=", {"suppress_tokens": ()}),
        ("--logit-bias 5=-1.5 --logit-bias 6=2", {"logit_bias": {5: -1.5, 6: 2.0}}),
        ("--ignore-eos --deadline 2.5 --tenant me", {"ignore_eos": True, "deadline": 2.5, "tenant": "me"}),
        ("--sequence-bias 5,7=-2 --sequence-bias 9=1", {"sequence_bias": {(5, 7): -2.0, (9,): 1.0}}),
        ("--exponential-decay-length-penalty 100,1.05", {"exponential_decay_length_penalty": (100, 1.05)}),
        ("--json-schema true", {"json_schema": "true"}),
    ],
)
def test_options_become_fields(words: str, fields: dict[str, object]) -> None:
    made = config(*words.split())
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("words", "message"),
    [("--stop-token-ids 5,x", "not a list of token ids"), ("--logit-bias 5:2", "not a bias such as")],
)
def test_tokens_that_are_none_are_refused(words: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=message):
        parser().parse_args(words.split())
