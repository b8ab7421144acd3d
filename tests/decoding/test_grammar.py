"""Constrained texts, whatever the model would rather say."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from mnemos.errors import ConfigError, MissingDependencyError, RequestError

from .driver import LetterTokenizer, generate, random_model, spec

pytest.importorskip("llguidance")

PIECES = [*(chr(c) for c in range(32, 127)), '{"', '": ', '",', "true", "null", "ab", "12", "é", "<end>"]
TOKENIZER = LetterTokenizer(PIECES, special=[len(PIECES) - 1])
SPEC = spec(len(PIECES), 4096, eos=(len(PIECES) - 1,))


def constrained(model_seed=0, model=None, **fields):
    model = model or random_model(len(PIECES), model_seed, scale=3.0)
    run = generate([1, 2], model, SPEC, TOKENIZER, **{"max_new_tokens": 400, **fields})
    end = run.finished[0]
    return end, TOKENIZER.decode(end.tokens[: end.text_tokens])


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.0, "typical_p": 0.5}], ids=str
)
@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)], ids=["dict", "text"])
def test_json_follows_its_schema(schema, sampling, seed):
    whitespace = {"bad_words_ids": [[PIECES.index(" ")]]}
    end, text = constrained(seed, json_schema=schema, **sampling, **whitespace)
    assert end.finish_reason == "stop"
    value = json.loads(text)
    assert set(value) == {"name", "age", "tags"}
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 120
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"x", "yy"}


@pytest.mark.parametrize("seed", range(3))
def test_regex_choice_and_grammar(seed):
    assert re.fullmatch(r"[a-c]{3}-\d{2,4}", constrained(seed, regex=r"[a-c]{3}-\d{2,4}")[1])
    choices = ["yes", "no", 'may"be\\', "café"]
    assert constrained(seed, choice=choices)[1] in choices
    end, text = constrained(seed, grammar='start: "(" start ")" | "x"', max_new_tokens=300)
    assert end.finish_reason == "length" or re.fullmatch(r"(\(*)x(\)*)", text)


def test_several_results_and_drafts_follow_the_grammar_alike():
    model = random_model(len(PIECES), 3, scale=3.0)
    fields = {"regex": "(ab|12){10}", "temperature": 1.0, "seed": 5, "n": 3, "max_new_tokens": 60}
    texts = [
        sorted(tuple(f.tokens) for f in generate([1, 2], model, SPEC, TOKENIZER, **fields, **more).finished)
        for more in ({}, {"speculative": "prompt_lookup"})
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    for tokens in texts[0]:
        assert re.fullmatch("(ab|12){10}", TOKENIZER.decode(tokens))


def test_a_complete_text_ends_at_once_and_an_open_one_with_end_of_text():
    assert constrained(choice=["yes"])[0].text_tokens is None
    always_end = lambda tokens: (np.eye(len(PIECES), dtype=np.float32)[-1] * 9, np.zeros(8, np.float32))  # noqa: E731
    end, text = constrained(model=always_end, regex="a{2,}")
    assert text == "aa"
    assert end.stopped_by == len(PIECES) - 1


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"type": "foo"}},
        {"json_schema": False},
        {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"$ref": "#/nowhere"}},
        {
            "json_schema": {
                "allOf": [
                    {"anyOf": [{"properties": {f"x{i}{j}": {"type": "integer"}}} for j in range(6)]} for i in range(8)
                ]
            }
        },
        {"json_schema": '{"type":"array","items":' * 500 + "{}" + "}" * 500},
        {"regex": "(a"},
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"grammar": "start: missing"},
        {"grammar": "start: start"},
        {"grammar": "nonsense"},
        {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        constrained(**fields)
    assert len(str(caught.value)) < 500


def test_a_constraint_needs_a_tokenizer_and_llguidance(monkeypatch):
    with pytest.raises(RequestError, match="regex needs a tokenizer"):
        generate([1, 2], random_model(4), spec(4), None, regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mnemos\[grammar\]'"):
        generate([1, 2], random_model(len(PIECES)), SPEC, LetterTokenizer(PIECES), regex="a")
