"""Constrained texts, whatever the model would rather say."""

from __future__ import annotations

import gc
import json
import re
import sys
import weakref

import numpy as np
import pytest

from mnemos.decoding import grammar
from mnemos.decoding.choice import DeadEnd
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


def test_any_json_is_json():
    end, text = constrained(json_schema=True, bad_words_ids=[[PIECES.index(piece)] for piece in ' {[":'])
    assert end.finish_reason == "stop" and not isinstance(json.loads(text), (dict, list))


@pytest.mark.parametrize("seed", range(3))
def test_regex_choice_and_grammar(seed):
    assert re.fullmatch(r"[a-c]{3}-\d{2,4}", constrained(seed, regex=r"[a-c]{3}-\d{2,4}")[1])
    choices = ["yes", "no", 'may"be\\', "café"]
    assert constrained(seed, choice=choices)[1] in choices
    end, text = constrained(seed, grammar='start: "(" start ")" | "x"', max_new_tokens=300)
    assert end.finish_reason == "length" or re.fullmatch(r"(\(*)x(\)*)", text)


def test_choices_are_meant_literally_and_may_be_many():
    special = ["a.c", "(x|y)", "[z]{2}", "$^*+?", "\\d", "a/b#c-d&e~f", "two\nlines", " led by a space", "t\tab"]
    for choice in special:
        letters = LetterTokenizer([*PIECES[:-1], "\n", "\t", "<end>"], special=[len(PIECES) + 1])
        end_spec = spec(len(PIECES) + 2, 4096, eos=(len(PIECES) + 1,))
        run = generate([1, 2], random_model(len(PIECES) + 2), end_spec, letters, choice=[choice], max_new_tokens=40)
        end = run.finished[0]
        assert letters.decode(end.tokens[: end.text_tokens]) == choice
    many = [f"number {n}" for n in range(16384)]
    assert constrained(5, choice=many, temperature=1.0, seed=2)[1] in many


SEARCHES = {
    "beams": {"num_beams": 3, "n": 2},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "n": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 4, "seed": 1},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "guidance": {"guidance_scale": 2.0, "negative_prompt": [3, 4]},
    "guided beams": {"num_beams": 2, "guidance_scale": 2.0},
    "best_of": {"best_of": 3, "temperature": 1.0, "seed": 3},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(2))
def test_every_search_follows_the_schema(search, seed):
    model = random_model(len(PIECES), seed, scale=3.0)
    fields = {**SEARCHES[search], "max_new_tokens": 300, "bad_words_ids": [[PIECES.index(" ")]]}
    run = generate([1, 2], model, SPEC, TOKENIZER, json_schema=PERSON, **fields)
    assert len(run.finished) == SEARCHES[search].get("n", 1)
    for end in run.finished:
        assert end.finish_reason == "stop"
        value = json.loads(TOKENIZER.decode(end.tokens[: end.text_tokens]))
        assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 8
        assert 0 <= value["age"] <= 120 and 1 <= len(value["tags"]) <= 3


def _spellings(text):
    """All token sequences of a text."""
    if not text:
        return [()]
    return [
        (token, *rest)
        for token, piece in enumerate(PIECES[:-1])
        if text.startswith(piece)
        for rest in _spellings(text[len(piece) :])
    ]


@pytest.mark.parametrize("seed", range(3))
def test_wide_beams_find_the_most_probable_texts_of_a_grammar(seed):
    model = random_model(len(PIECES), seed, scale=3.0)
    choices = ["ab12", "true", "nullab", "12", 'ab{"']

    def score(tokens):
        total = 0.0
        for place, token in enumerate(tokens):
            row = model([1, 2, *tokens[:place]])[0].astype(np.float64)
            total += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
        return total

    spelt = sorted((tokens for text in choices for tokens in _spellings(text)), key=score, reverse=True)
    fields = {"num_beams": 32, "n": 4, "length_penalty": 0.0, "early_stopping": "never"}
    found = generate([1, 2], model, SPEC, TOKENIZER, choice=choices, max_new_tokens=20, **fields).finished
    assert [tuple(end.tokens) for end in found] == spelt[:4]
    assert [end.score for end in found] == pytest.approx([score(tokens) for tokens in spelt[:4]], abs=1e-3)


def test_a_beam_that_nothing_may_follow_leaves_the_others_alone():
    flat = lambda tokens: (np.zeros(len(PIECES), np.float32), np.zeros(8, np.float32))  # noqa: E731
    fields = {"regex": "x{3}y|c{6}", "bad_words_ids": [[PIECES.index("y")]], "num_beams": 2, "max_new_tokens": 9}
    end = generate([1, 2], flat, SPEC, TOKENIZER, **fields).finished[0]
    assert (TOKENIZER.decode(end.tokens), end.finish_reason) == ("cccccc", "stop")
    dead = {**fields, "regex": "xxxy"}
    end = generate([1, 2], flat, SPEC, TOKENIZER, **dead).finished[0]
    assert (TOKENIZER.decode(end.tokens), end.finish_reason) == ("xxx", "error")
    assert "every token is forbidden" in end.error
    contrastive = {name: value for name, value in dead.items() if name != "num_beams"} | {"penalty_alpha": 0.5}
    end = generate([1, 2], flat, SPEC, TOKENIZER, **contrastive).finished[0]
    assert (TOKENIZER.decode(end.tokens), end.finish_reason) == ("xxx", "error")


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
        {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
        {"regex": "(a"},
        {"regex": r"[^\s\S]"},
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


@pytest.mark.parametrize(
    "fields", [{"json_schema": {"$ref": "#"}}, {"grammar": "start: start"}, {"regex": r"[^\s\S]"}], ids=str
)
def test_what_no_text_follows_is_said_to_be_so(fields):
    with pytest.raises(ConfigError, match="no text follows it, or only by rules that never terminate"):
        constrained(**fields)


def _nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


EXPLOSIVE = {
    "optional letters": {"regex": "(a?){1000}a{1000}"},
    "nested repeats": {"regex": "(((a{1,100}){1,100}){1,100}){1,100}"},
    "exponential automaton": {"regex": "(a|b)*a(a|b){40}"},
    "long repeat": {"regex": "x{1,2000000000}"},
    "wide object": {"json_schema": {"properties": {f"k{n}": {"type": "string"} for n in range(2500)}}},
    "huge enum": {"json_schema": {"enum": [f"value {n}" for n in range(20000)]}},
    "long array": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}},
    "deep object": {"json_schema": _nested(3000)},
    "ambiguous": {"grammar": 'start: start start | "a" | "b"'},
    "endless": {"grammar": 'start: "a" start'},
    "many rules": {"grammar": "start: " + " | ".join(f'"x{n}" start?' for n in range(3000))},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLOSIVE)
def test_explosive_grammars_are_refused_or_followed(name):
    """Either it is refused, or every token is one that the grammar allows."""
    try:
        end, text = constrained(2, max_new_tokens=30, **EXPLOSIVE[name])
    except (ConfigError, RequestError) as error:
        assert len(str(error)) < 500
        return
    assert end.finish_reason in ("length", "stop", "error")
    letters, numbers = "[ab]+", r"\[[-\d\s,]*"
    allowed = {
        "exponential automaton": letters,
        "ambiguous": letters,
        "long repeat": "x+",
        "long array": numbers,
    }
    if name in allowed:
        assert re.fullmatch(allowed[name], text)
    elif name == "huge enum":
        assert any(f'"value {n}"'.startswith(text) for n in range(20000))


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "seed": 1}, {"speculative": "prompt_lookup"}], ids=str)
def test_a_text_that_nothing_may_follow_ends_with_the_reason(more):
    fields = {"regex": "xxxy", "bad_words_ids": [[PIECES.index("y")]]}
    end, text = constrained(**fields, **more)
    assert (text, end.finish_reason, end.stopped_by) == ("xxx", "error", None)
    assert end.error.startswith("every token is forbidden here; loosen bad_words")
    forced, text = constrained(regex="a{9}", max_new_tokens=5, forced_eos_token_id=PIECES.index("z"), **more)
    assert (text, forced.finish_reason) == ("aaaa", "error")
    with pytest.raises(RequestError, match="every token is forbidden"):  # there is no text to keep
        constrained(regex="y", bad_words_ids=fields["bad_words_ids"], **more)


def test_one_of_several_texts_ends_and_the_others_go_on():
    fields = {"regex": "x{3}y|c{6}", "bad_words_ids": [[PIECES.index("y")]]}
    flat = lambda tokens: (np.zeros(len(PIECES), np.float32), np.zeros(8, np.float32))  # noqa: E731
    run = generate([1, 2], flat, SPEC, TOKENIZER, n=8, temperature=1.0, seed=3, max_new_tokens=20, **fields)
    results = {(TOKENIZER.decode(end.tokens), end.finish_reason) for end in run.finished}
    assert results == {("xxx", "error"), ("cccccc", "stop")}


def test_a_state_beyond_the_limits_ends_the_text(monkeypatch):
    def accept(self, token):
        original(self, token)
        if self.tokens == 3:
            raise DeadEnd("the grammar is too complex")
        self.tokens += 1

    original = grammar.GrammarConstraint.accept
    monkeypatch.setattr(grammar.GrammarConstraint, "tokens", 1, raising=False)
    monkeypatch.setattr(grammar.GrammarConstraint, "accept", accept)
    end, text = constrained(regex="a{9}")
    assert (text, end.finish_reason, end.error) == ("aaa", "error", "the grammar is too complex")


def test_one_compiler_serves_all_ends_of_texts_and_goes_with_its_tokenizer():
    letters = LetterTokenizer(PIECES, special=[len(PIECES) - 1])
    for end in range(20):
        ends = spec(len(PIECES), 4096, eos=(end,))
        run = generate([1, 2], random_model(len(PIECES), end), ends, letters, regex="[0-9]{2,5}", max_new_tokens=9)
        assert re.fullmatch("[0-9]{2,5}", letters.decode(run.tokens[: run.finished[0].text_tokens]))
    known = weakref.ref(grammar._compilers[letters])
    del letters, run
    gc.collect()
    assert known() is None


def test_a_grammar_is_compiled_once_and_its_texts_are_independent(monkeypatch):
    letters = LetterTokenizer(PIECES, special=[len(PIECES) - 1])
    model, compiled = random_model(len(PIECES), 3, scale=3.0), []
    compile_ = grammar.GrammarCompiler._compile
    monkeypatch.setattr(
        grammar.GrammarCompiler, "_compile", lambda self, *given: compiled.append(given) or compile_(self, *given)
    )
    fields = {"temperature": 1.0, "max_new_tokens": 200, "bad_words_ids": [[PIECES.index(" ")]]}
    runs = [generate([1, 2], model, SPEC, letters, seed=seed, json_schema=PERSON, **fields) for seed in (1, 2, 1)]
    assert len(compiled) == 1
    assert runs[0].tokens == runs[2].tokens != runs[1].tokens
    for run in runs:
        assert set(json.loads(letters.decode(run.tokens))) == {"name", "age", "tags"}
    generate([1, 2], model, SPEC, letters, json_schema={**PERSON, "strict": 1}, strict=False, **fields)
    assert len(compiled) == 2


def test_what_is_compiled_is_kept_within_bounds(monkeypatch):
    letters = LetterTokenizer(PIECES, special=[len(PIECES) - 1])
    monkeypatch.setattr(grammar, "KEPT", 2)
    monkeypatch.setattr(grammar, "KEPT_LENGTH", 10)
    for regex in ("aaa", "bbb", "aaa", "ccc", "dddddd", "e" * 11):
        generate([1, 2], random_model(len(PIECES)), SPEC, letters, regex=regex, max_new_tokens=2)
    kept = grammar._compilers[letters]._kept
    assert [source for _, source, _ in kept] == ["ccc", "dddddd"]


def test_what_would_take_long_to_compile_is_refused():
    optional = {f"k{n}": {"type": "string"} for n in range(2001)}
    needed = {"type": "object", "properties": optional, "required": list(optional)}
    end, text = constrained(json_schema=needed, max_new_tokens=3)
    assert text.startswith("{") and end.finish_reason == "length"
    schemas = [
        {"properties": optional},
        {"items": [{"properties": {"enum": {"properties": optional}}}]},
        {"allOf": [needed, {"properties": {f"other{n}": {} for n in range(2001)}}]},
    ]
    for schema in schemas:
        with pytest.raises(ConfigError, match="2001 optional properties; it may have 2000"):
            constrained(json_schema=schema)
    many = {f"k{n}": {"type": "string", "pattern": f"x{n}(?=y)"} for n in range(2001)}
    with pytest.raises(ConfigError, match="2001 patterns"):
        constrained(json_schema={"properties": many, "required": list(many)})


def test_properties_may_be_called_as_keywords():
    names = {"pattern": {"type": "string", "pattern": "^x(?=y)"}, "enum": {"type": "string", "pattern": "^q$"}}
    with pytest.warns(UserWarning, match=r"not enforced: pattern '\^x\(\?=y\)';"):
        text = constrained(
            json_schema={"type": "object", "properties": names, "required": list(names)},
            bad_words_ids=[[PIECES.index(" ")]],
            temperature=1.0,
            seed=1,
        )[1]
    assert json.loads(text)["enum"] == "q"


def test_a_token_that_is_text_ends_texts_only_where_they_are_complete():
    digit = PIECES.index("7")
    ends = spec(len(PIECES), 4096, eos=(digit,))
    sevens = lambda tokens: (np.eye(len(PIECES), dtype=np.float32)[digit] * 9, np.zeros(8, np.float32))  # noqa: E731
    end = generate([1, 2], sevens, ends, TOKENIZER, regex="[0-9]{3,}", max_new_tokens=9).finished[0]
    assert (TOKENIZER.decode(end.tokens[: end.text_tokens]), end.stopped_by) == ("000", digit)


def test_a_constraint_needs_a_tokenizer_and_llguidance(monkeypatch):
    with pytest.raises(RequestError, match="regex needs a tokenizer"):
        generate([1, 2], random_model(4), spec(4), None, regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mnemos\[grammar\]'"):
        generate([1, 2], random_model(len(PIECES)), SPEC, LetterTokenizer(PIECES), regex="a")
