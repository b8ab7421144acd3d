"""Rules given as text work with every kind of vocabulary: byte-level, SentencePiece, and Metaspace."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from mnemos.contract import Batch, KVLayout, ModelSpec, Output
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from mnemos.text.tokenizer import Tokenizer
from tests.text.conftest import NAMES, tokenizer_of, vocabulary_file

__all__ = ["tokenizer_of", "vocabulary_file"]


class Cache:
    """A cache of nothing: the model below looks at no position."""

    def __init__(self, layout: KVLayout, pages: int) -> None:
        self.layout, self.pages = layout, pages

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        pass

    def read(self, page: int) -> np.ndarray:
        return np.zeros(0, np.uint8)

    def write(self, page: int, content: np.ndarray) -> None:
        pass


class Undecided:
    """All tokens are equally probable: only the request's own rules decide."""

    def __init__(self, size: int) -> None:
        self.spec = ModelSpec("undecided", size, 512, 1, KVLayout(layers=1, kv_heads=1, head_dim=1))

    def reserve(self, pages: int) -> None:
        self.cache = Cache(self.spec.layout, pages)

    def forward(self, batch: Batch) -> Output:
        rows = len(batch.logit_rows)
        logits = np.zeros((rows, self.spec.vocabulary_size), np.float32)
        return Output(logits, np.zeros((rows, 1), np.float32), np.zeros(rows, np.int32) if batch.greedy else None)


def metaspace() -> Tokenizer:
    """A `tokenizer.json` of words and letters with Metaspace, as in converted SentencePiece models."""
    library = pytest.importorskip("tokenizers")
    letters = [chr(code) for code in range(33, 127)]
    words = ["<unk>", "<|end|>", "\u2581", *letters, "\u2581world", "\u2581no", "world"]
    merges = [("\u2581", "world"), ("\u2581", "no"), ("n", "o")]
    for word in ("world", "no"):
        merges += [(word[:cut], word[cut]) for cut in range(1, len(word))]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*words, *(a + b for a, b in merges)]))}
    model = library.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")
    inner = library.Tokenizer(model)
    inner.pre_tokenizer = library.pre_tokenizers.Metaspace()
    inner.decoder = library.decoders.Metaspace()
    inner.add_special_tokens(["<|end|>"])
    return inner


@pytest.fixture(scope="module", params=[*NAMES, "metaspace"])
def tokenizer(
    request: pytest.FixtureRequest,
    tokenizer_of: Callable[[str], Tokenizer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    if request.param != "metaspace":
        return tokenizer_of(request.param)
    file = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    metaspace().save(str(file))
    return Tokenizer.from_file(file)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Iterator[InferenceEngine]:
    with InferenceEngine(Undecided(tokenizer.vocabulary_size), tokenizer) as made:
        yield made


def says(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], Callable[[Sequence[int], Any], None]]:
    """(prompt, the tokens of `text` after it, a logits processor that has them chosen)."""
    prompt = tokenizer.encode("Hello,")
    tokens = tokenizer.encode(text, continues=True)

    def speak(ids: Sequence[int], logits: Any) -> None:
        logits[:] = -np.inf
        logits[tokens[min(len(ids) - len(prompt), len(tokens) - 1)]] = 0

    return prompt, tokens, speak


def test_a_continued_text_decodes_to_itself(tokenizer: Tokenizer) -> None:
    for text in ("world", " world", "no-no", "  world", "a" if tokenizer.vocabulary_size else ""):
        assert tokenizer.decode(tokenizer.encode(text, continues=True), continues=True) == text


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[a-z]-2024-[0-9]"}, "[a-z]-2024-[0-9]"),
        ({"grammar": 'start: "abc" "def"'}, "abcdef"),
        ({"regex": "[a-z]-2024-[0-9]", "guidance_scale": 2, "negative_prompt": "No"}, "[a-z]-2024-[0-9]"),
    ],
)
def test_a_constraint_with_forced_text(
    field: dict[str, Any], pattern: str, engine: InferenceEngine, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("llguidance")
    completion = engine.complete(tokenizer.encode("Hello,"), max_new_tokens=40, **field)
    assert re.fullmatch(pattern, completion.text), completion.text


def test_json_ends(engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    """Even a model that prefers endless white space comes to an end."""
    pytest.importorskip("llguidance")
    age = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"], "additionalProperties": False}
    completion = engine.complete(tokenizer.encode("Hello,"), max_new_tokens=200, json_schema=schema)
    assert 1 <= json.loads(completion.text)["age"] <= 9


def test_a_stop_string_that_never_comes_changes_nothing(engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    prompt, tokens, speak = says(tokenizer, " world, no. world")
    options = {"logits_processors": speak, "max_new_tokens": len(tokens)}
    assert engine.complete(prompt, **options).text == " world, no. world"
    assert engine.complete(prompt, stop=["never"], **options).text == " world, no. world"
    assert engine.complete(prompt, stop=["no"], **options).text == " world, "


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_may_be_a_special_token(engine: InferenceEngine, tokenizer: Tokenizer, beams: int) -> None:
    special = max(sorted(tokenizer.special_ids), key=lambda token: len(tokenizer.decode([token], skip_special=False)))
    name = tokenizer.decode([special], skip_special=False, continues=True)
    prompt = tokenizer.encode("Hello,")
    answer = tokenizer.encode(" no", continues=True)
    said = [*answer, special, *tokenizer.encode("no", continues=True), *answer]

    def speak(ids: Sequence[int], logits: Any) -> None:
        logits[:] = -np.inf
        logits[said[min(len(ids) - len(prompt), len(said) - 1)]] = 0

    for stop in (name, name + "no"):
        completion = engine.complete(
            prompt, logits_processors=speak, max_new_tokens=len(said), ignore_eos=True, stop=[stop], num_beams=beams
        )
        assert (completion.text, completion.finish_reason) == (" no", "stop")
    completion = engine.complete(
        prompt,
        logits_processors=speak,
        max_new_tokens=len(said),
        ignore_eos=True,
        stop=[name + "never"],
        num_beams=beams,
    )
    assert completion.text == " nono no"


@pytest.mark.parametrize("before", ["", " ", "(", "\n"])
def test_a_bad_word_is_banned_wherever_it_stands(engine: InferenceEngine, tokenizer: Tokenizer, before: str) -> None:
    text = before + "world"
    if "\n" in text and tokenizer.decode(tokenizer.encode(text, continues=True), continues=True) != text:
        pytest.skip("the vocabulary has no line break")
    prompt, tokens, _ = says(tokenizer, text)

    def prefer(ids: Sequence[int], logits: Any) -> None:
        logits[tokens[min(len(ids) - len(prompt), len(tokens) - 1)]] += 5

    free = engine.complete(prompt, logits_processors=prefer, max_new_tokens=len(tokens), ignore_eos=True)
    assert free.text == text
    bound = engine.complete(
        prompt, logits_processors=prefer, max_new_tokens=len(tokens), ignore_eos=True, bad_words=["world"]
    )
    assert "world" not in bound.text


KEYWORDS = {
    "uniqueItems": {"type": "array", "items": {"enum": [1]}, "minItems": 1, "maxItems": 1, "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a$"}, "additionalProperties": False},
    "not": {"not": {"type": "string"}, "enum": [1]},
    "if": {"enum": [1], "if": {"const": 1}, "then": {"type": "integer"}},
    "contains": {"type": "array", "items": {"enum": [1]}, "minItems": 1, "maxItems": 1, "contains": {"const": 1}},
    "oneOf": {"oneOf": [{"const": 1}, {"enum": [1, 2]}]},
    "(?=.*[A-Z])": {"type": "string", "pattern": "^(?=.*[A-Z]).{3}$", "maxLength": 3},
}


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of("gpt-2")
    with InferenceEngine(Undecided(tokenizer.vocabulary_size), tokenizer) as engine:
        with pytest.warns(UserWarning, match=re.escape(keyword)):
            text = engine.complete([1], max_new_tokens=100, json_schema=KEYWORDS[keyword]).text
        json.loads(text)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_strict_refuses_such_a_keyword(keyword: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of("gpt-2")
    refused = pytest.raises(ConfigError, match=f"json_schema cannot be enforced: strict is True.*{re.escape(keyword)}")
    with InferenceEngine(Undecided(tokenizer.vocabulary_size), tokenizer) as engine, refused:
        engine.complete([1], json_schema=KEYWORDS[keyword], strict=True)


def test_strict_changes_nothing_for_a_schema_that_can_be_enforced(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of("gpt-2")
    schema = {"type": "string", "format": "password", "maxLength": 3}
    with InferenceEngine(Undecided(tokenizer.vocabulary_size), tokenizer) as engine:
        assert len(json.loads(engine.complete([1], max_new_tokens=100, json_schema=schema, strict=True).text)) <= 3
        with pytest.raises(ConfigError, match="strict is True .* it needs json_schema"):
            engine.complete([1], strict=True)


def test_an_unknown_format_says_nothing_of_the_text(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    pytest.importorskip("llguidance")
    tokenizer = tokenizer_of("gpt-2")
    schema = {"type": "string", "format": "password", "maxLength": 3}
    with InferenceEngine(Undecided(tokenizer.vocabulary_size), tokenizer) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(json.loads(engine.complete([1], max_new_tokens=100, json_schema=schema).text)) <= 3


def longest_special(tokenizer: Tokenizer) -> tuple[int, str]:
    """A special token and its name."""
    special = max(sorted(tokenizer.special_ids), key=lambda token: len(tokenizer.decode([token], skip_special=False)))
    return special, tokenizer.decode([special], skip_special=False, continues=True)


def streamed(engine: InferenceEngine, prompt: Sequence[int], **fields: Any) -> str:
    """The text of a stream, whose pieces begin where the ones before end."""
    text = ""
    for token in engine.stream(list(prompt), **fields):
        assert token.text_offset == len(text)
        text += token.text
    return text


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_belongs_to_the_text_if_asked(
    engine: InferenceEngine, tokenizer: Tokenizer, beams: int, included: bool
) -> None:
    prompt, tokens, speak = says(tokenizer, " world, no. world")
    fields = {
        "logits_processors": speak,
        "max_new_tokens": len(tokens),
        "num_beams": beams,
        "include_stop_str_in_output": included,
    }
    for stop in ("no", "o.", "rld, n", " no"):
        before = " world, no. world".partition(stop)[0]
        wanted = before + stop if included else before
        completion = engine.complete(prompt, stop=[stop], **fields)
        assert (completion.text, completion.finish_reason) == (wanted, "stop")
        assert streamed(engine, prompt, stop=[stop], **fields) == wanted


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("stop", [(), ("never",)], ids=["", "with a stop string"])
def test_special_tokens_are_shown_if_asked(
    engine: InferenceEngine, tokenizer: Tokenizer, beams: int, stop: Sequence[str]
) -> None:
    special, name = longest_special(tokenizer)
    prompt, answer = tokenizer.encode("Hello,"), tokenizer.encode(" no", continues=True)
    said = [*answer, special, *answer, special]

    def speak(ids: Sequence[int], logits: Any) -> None:
        logits[:] = -np.inf
        logits[said[min(len(ids) - len(prompt), len(said) - 1)]] = 0

    fields = {"logits_processors": speak, "max_new_tokens": len(said), "num_beams": beams, "stop": stop}
    for ending, texts in {
        "none": (" no no", f" no{name} no{name}"),
        "token": (" no", f" no{name}"),  # the stop token is `special`, which comes after " no"
    }.items():
        rules = {"stop_token_ids": [special], "include_stop_str_in_output": True} if ending == "token" else {}
        for shown, wanted in zip((False, True), texts, strict=True):
            own = {**fields, **rules, "ignore_eos": True, "skip_special_tokens": not shown}
            assert engine.complete(prompt, **own).text == wanted
            assert streamed(engine, prompt, **own) == wanted
    left_out = engine.complete(prompt, **fields, ignore_eos=True, stop_token_ids=[special], skip_special_tokens=False)
    assert left_out.text == " no"


def test_each_token_has_the_place_of_its_text(engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    prompt, tokens, speak = says(tokenizer, " world, no. world")
    fields = {"logits_processors": speak, "max_new_tokens": len(tokens)}
    choice = engine.complete(prompt, logprobs=0, **fields).choices[0]
    starts = [len(tokenizer.decode(tokens[:count], continues=True)) for count in range(len(tokens))]
    assert choice.text_offsets == starts
    stopped = engine.complete(prompt, logprobs=0, stop=["no"], **fields).choices[0]
    assert stopped.text_offsets == [min(start, len(" world, ")) for start in starts[: len(stopped.token_ids)]]
    assert engine.complete(prompt, **fields).choices[0].text_offsets == []


def test_the_stop_token_of_a_text_is_its_last_id(engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    prompt, tokens, speak = says(tokenizer, " world, no. world")
    last = tokenizer.encode(" world, no.", continues=True)[-1]
    text = tokenizer.decode(tokens[: tokens.index(last) + 1], continues=True)
    fields = {"logits_processors": speak, "max_new_tokens": len(tokens), "stop_token_ids": [last]}
    without, included = (engine.complete(prompt, include_stop_str_in_output=one, **fields) for one in (False, True))
    assert without.token_ids == included.token_ids == tokens[: tokens.index(last) + 1]
    assert without.choices[0].stopped_by == included.choices[0].stopped_by == last
    assert (without.text, included.text) == (text[: len(without.text)], text) and without.text != text
