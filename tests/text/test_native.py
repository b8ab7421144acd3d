"""The native tokenizers give the ids that the `tokenizers` library gives, and refuse what they do not know."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemos import _native
from mnemos.errors import FormatError, MissingDependencyError, MnemosError, RequestError, UnsupportedError
from mnemos.formats.gguf import GGUFFile
from mnemos.text.library import LibraryEncoder
from mnemos.text.pretokenizers import PRE_TOKENIZERS
from mnemos.text.tokenizer import Tokenizer

from .conftest import NAMES
from .metadata import byte_level
from .oracle import PIECES, Pair, file_pair, gguf_pair, make_models, random_text, sentencepiece_metadata, variants
from .test_vectors import TEXTS

TRAINING = [*TEXTS, " ".join(PIECES), *PIECES, *("the hello word don't " + piece for piece in PIECES)] * 2


def assert_same(pair: Pair, texts: list[str]) -> None:
    assert [difference for text in texts if (difference := pair.difference(text))] == []


def test_every_kind_of_tokenizer_json(tmp_path: Path) -> None:
    chance = random.Random(7)
    for name, tokenizer in variants(make_models(TRAINING)):
        assert_same(file_pair(name, tokenizer, tmp_path), [random_text(chance) for _ in range(20)])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_with_its_table_of_characters(kind: str, tmp_path: Path) -> None:
    chance = random.Random(8)
    pair = gguf_pair(kind, sentencepiece_metadata(tmp_path, kind, TRAINING))
    assert_same(pair, [*TEXTS, *PIECES, *(random_text(chance) for _ in range(300))])


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_vocabularies_of_models(name: str, vocabulary_file: Callable[[str], Path]) -> None:
    chance = random.Random(9)
    pair = gguf_pair(name, dict(GGUFFile.open(vocabulary_file(name)).metadata))
    texts = [random_text(chance) for _ in range(300)]
    assert_same(pair, [*PIECES, *texts, "".join(texts)])


@pytest.mark.parametrize("style", sorted({style: name for name, style in PRE_TOKENIZERS.items()}.values()))
def test_every_pre_tokenizer_of_gguf(style: str) -> None:
    chance = random.Random(style)
    pair = gguf_pair(style, byte_level(pre=style, model="gpt2"))
    assert_same(pair, [random_text(chance) for _ in range(60)])


def test_the_library_is_not_needed(vocabulary_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name in NAMES:
        tokenizer = Tokenizer.from_gguf(vocabulary_file(name))
        assert tokenizer.decode(tokenizer.encode("no library")) == "no library"


UNKNOWN = [
    {"pre_tokenizer": {"type": "UnicodeScripts"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(a)\1"}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Nmt"}},
]


@pytest.mark.parametrize("steps", UNKNOWN, ids=lambda steps: next(iter(steps.values()))["type"])
def test_what_the_core_does_not_know_is_left_to_the_library(
    steps: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": model, **steps}))
    tokenizer = Tokenizer.from_file(file)
    assert tokenizer.encode("ab") == [0, 1] and isinstance(tokenizer._core.encoder, LibraryEncoder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"tokenizer\.json: .* pip install 'mnemos\[tokenizers\]'"):
        Tokenizer.from_file(file).prepare()


@pytest.mark.parametrize(
    "pattern",
    ["", "a*", "(?:a?)+", "(a)\\1", "(?<=ab)c", "[[:alpha:]]", "[z-a]", "a{2}?", "(", ")", "[a-", "\\", "\\p{Greek}",
     "(?i:ss)", "(?<name>a)", "\\xff", "a{1001}", "(?:" * 60 + "a" + ")" * 60],
)  # fmt: skip
def test_regular_expressions_that_are_refused(pattern: str) -> None:
    encoder = _native.Encoder(_native.word_level(_native.Pieces(["a"]), 0))
    with pytest.raises(UnsupportedError):
        encoder.cut_at(pattern, False, "Isolated", False)


PATTERN = st.text("ab.+*?|()[]^$\\{}1,-&!=<>pLsdwi: ", max_size=14)


@given(pattern=PATTERN, text=st.text("ab1 \n\u00e9", max_size=12))
@settings(max_examples=400)
def test_any_regular_expression_cuts_as_in_the_library_or_is_refused(pattern: str, text: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    encoder = _native.Encoder(_native.word_level(_native.Pieces(["?", "a", "b", "ab", "1", " ", "\n"]), 0))
    try:
        encoder.cut_at(pattern, False, "Isolated", False)
    except UnsupportedError:
        return
    library = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "ab": 3, "1": 4, " ": 5, "\n": 6}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    assert encoder.encode(text, False, True) == library.encode(text).ids


def test_a_long_list_of_merges_is_read_twice() -> None:
    """By texts for the first words, by ids after many; the ids are the same."""
    letters = [chr(ord("a") + i) for i in range(26)]
    pairs = [a + b for a in letters for b in letters]
    merges = [f"{a} {b}" for a in letters for b in letters] + [f"{pair} {c}" for pair in pairs for c in letters][:6000]
    pieces = _native.Pieces([*letters, *pairs, *(merge.replace(" ", "") for merge in merges[676:])])
    encoder = _native.Encoder(_native.bpe(pieces, merges, (-1, False, False, False, "", "")))
    chance = random.Random(3)
    words = ["".join(chance.choices(letters, k=chance.randrange(1, 60))) for _ in range(900)]
    first = [encoder.encode(word, False, True) for word in words[:20]]
    for word in words:
        assert "".join(map(pieces.text, encoder.encode(word, False, True))) == word
    assert [encoder.encode(word, False, True) for word in words[:20]] == first


def test_a_merge_that_does_not_fit_is_an_error_where_a_text_needs_it() -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    merges = [f"{a}{b} {c}" for a in letters for b in letters for c in letters[:9]] + ["a b"]
    encoder = _native.Encoder(_native.bpe(_native.Pieces(letters), merges, (-1, False, False, False, "", "")))
    assert encoder.encode("ba", False, True) == [1, 0]
    with pytest.raises(FormatError, match="merge 6084 needs the token 'ab', which is not in the vocabulary"):
        encoder.encode("ab", False, True)


def test_many_threads_share_one_encoder(vocabulary_file: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_gguf(vocabulary_file("gpt-2"))
    chance = random.Random(5)
    texts = ["".join(random_text(chance) for _ in range(40)) for _ in range(8)]
    expected = [Tokenizer.from_gguf(vocabulary_file("gpt-2")).encode(text) for text in texts]
    found: list[list[int]] = [[] for _ in texts]

    def encode(i: int) -> None:
        found[i] = tokenizer.encode(texts[i])

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_strings_that_reach_beyond_the_buffer_are_refused() -> None:
    data = np.frombuffer(b"".join(len(s).to_bytes(8, "little") + s for s in (b"one", b"", b"three")), np.uint8)
    pieces = _native.Pieces.of_strings(data, 3)
    assert [pieces.text(i) for i in range(3)] == ["one", "", "three"] and pieces.empty_numbers() == [1]
    assert (pieces.find("three"), pieces.find(""), pieces.find("on")) == (2, -1, -1)
    with pytest.raises(IndexError):
        pieces.text(3)
    for buffer, count in ((data, 4), (data[:-1], 3), (data[:12], 2), (data[:7], 1), (data[-8:], 1)):
        with pytest.raises(FormatError, match="beyond the end"):
            _native.Pieces.of_strings(buffer, count)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_table_of_characters_works_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    table = CHARACTERS
    at = data.draw(st.integers(0, len(table) - 1))
    changed = table[:at] + data.draw(st.binary(max_size=8)) + table[at + data.draw(st.integers(0, 12)) :]
    encoder = _native.Encoder(_native.unigram(_native.Pieces(["?"]), np.zeros(1), [], 0, False))
    try:
        encoder.map_characters(changed)
        encoder.encode("\ufb01 \uff21 e\u0301 \u00bd" + data.draw(st.text(max_size=8)), False, True)
    except MnemosError:
        pass


def _characters() -> bytes:
    """A small double array: the ligature fi becomes its letters."""
    import io

    import sentencepiece

    from mnemos.text.sentencepiece import _fields

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=model, vocab_size=6, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="nfkc",
    )  # fmt: skip
    table: bytes = dict(_fields(dict(_fields(model.getvalue(), "model"))[3], "normalizer_spec"))[2]
    return table


CHARACTERS = _characters()


def test_a_word_without_a_token_is_refused() -> None:
    encoder = _native.Encoder(_native.word_level(_native.Pieces(["a"]), -1))
    with pytest.raises(RequestError, match="not in the vocabulary"):
        encoder.encode("b", False, True)
