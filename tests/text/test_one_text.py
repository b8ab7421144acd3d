"""A tokenizer made for one text encodes it as the whole tokenizer does, and the first short texts need no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemos.errors import FormatError
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.string_array import StringArray, locate_strings
from mnemos.text.core import TokenizerCore
from mnemos.text.gguf import build_core, build_core_for, can_build_for_text
from mnemos.text.pretokenizers import PRE_TOKENIZERS
from mnemos.text.tokenizer import LONGEST_TEXT, MOST_TEXTS, Tokenizer

from .metadata import byte_level, sentencepiece
from .test_vectors import TEXTS

BYTE_PAIRS = ("gpt-2", "llama-bpe", "qwen2", "starcoder")
PRE = "tokenizer.ggml.pre"
VocabularyFile = Callable[[str], Path]
# Characters that splits, merges and special tokens depend on, in orders that no text has.
PIECES = (
    " ", "  ", "\n", "\t", "\r\n", "the", " the", "The", "hell", "o", "ing", "'s", "'LL", "don't", "1", "123", "4567",
    "...", "--", "_", "\u00e9", "\u0301", "\u4f60\u597d", "\uac00", "\u3042", "\U0001f600", "\u200d", "\u00a0", "\0",
    "\ufffd", "</s>", "<|endoftext|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "<|start|>",
    "\u2581", "<0x0A>", "A", "zq",
)  # fmt: skip
RANDOM_TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def whole(file: Path) -> tuple[dict[str, Any], TokenizerCore]:
    metadata = dict(GGUFFile.open(file).metadata)
    return metadata, build_core(metadata, "whole")


@cache
def whole_in_style(file: Path, style: str) -> tuple[dict[str, Any], TokenizerCore | None]:
    """A vocabulary with another pre-tokenizer; None if it lacks characters that this one needs."""
    metadata = whole(file)[0] | {PRE: style}
    try:
        return metadata, build_core(metadata, "whole")
    except FormatError:
        return metadata, None


def assert_same(text: str, metadata: dict[str, Any], expected: TokenizerCore) -> None:
    core = build_core_for(text, metadata, "one text")
    assert not core.whole
    for parse_special in (True, False):
        ids = core.encode(text, True, parse_special)
        assert ids == expected.encode(text, True, parse_special)
        assert [core.token_bytes(token) for token in ids] == [expected.token_bytes(token) for token in ids]
    for field in ("special_ids", "literal_ids", "silent_ids", "eos_ids", "bos_id", "eos_id", "pad_id", "unknown_id"):
        assert getattr(core, field) == getattr(expected, field)


@pytest.mark.parametrize("name", BYTE_PAIRS)
def test_known_texts(name: str, vocabulary_file: VocabularyFile) -> None:
    metadata, expected = whole(vocabulary_file(name))
    assert can_build_for_text(metadata)
    for text in TEXTS:
        assert_same(text, metadata, expected)


@pytest.mark.parametrize("name", BYTE_PAIRS)
@given(text=RANDOM_TEXTS)
@FEW
def test_random_texts(name: str, text: str, vocabulary_file: VocabularyFile) -> None:
    assert_same(text, *whole(vocabulary_file(name)))


@given(text=RANDOM_TEXTS, style=st.sampled_from(sorted(set(PRE_TOKENIZERS) - {"gemma4"})))
@FEW
def test_random_texts_with_every_pre_tokenizer(text: str, style: str, vocabulary_file: VocabularyFile) -> None:
    metadata, expected = whole_in_style(vocabulary_file("gpt-2"), style)
    if expected is None:
        with pytest.raises(FormatError):
            build_core_for(text, metadata, "one text")
    else:
        assert_same(text, metadata, expected)


@given(text=st.one_of(RANDOM_TEXTS, st.text("helo \n\u00e9<>x0A", max_size=30)))
@FEW
def test_tokens_of_plain_text_with_bytes_to_fall_back_on(text: str) -> None:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "\n", "\n\n", "<|a b|>"]
    metadata = in_file(
        byte_level(
            model="gemma4",
            tokens=[*bytes_, *words],
            token_type=np.array([6] * 256 + [1] * 12 + [3], dtype=np.int32),
            merges=["h e", "l l", "he ll", "hell o", "\u2581 hello", "\n \n"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for written in (text, f"{text}<|a b|>{text}"):
        assert_same(written, metadata, build_core(metadata, "whole"))


def test_the_whole_is_built_for_many_texts_or_a_long_one(vocabulary_file: VocabularyFile) -> None:
    metadata, expected = whole(vocabulary_file("gpt-2"))
    texts = [f"text {n}" for n in range(MOST_TEXTS + 1)]
    tokenizer, built = counted(metadata, expected)
    for text in texts:
        assert built == []
        assert tokenizer.encode(text) == expected.encode(text, True, True)
    assert built == ["whole"] and tokenizer.encode("more") == expected.encode("more", True, True)

    tokenizer, built = counted(metadata, expected)
    long = "a b" * LONGEST_TEXT
    assert tokenizer.decode(tokenizer.encode(long)) == long and built == ["whole"]
    tokenizer, built = counted(metadata, expected)
    assert tokenizer.prepare() is tokenizer and built == ["whole"]


def test_a_first_answer_needs_no_more_than_its_prompt(vocabulary_file: VocabularyFile) -> None:
    tokenizer, built = counted(*whole(vocabulary_file("qwen2")))
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    tokenizer.warm_up()
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi there"}])
    assert ids == [151644, 13048, 1052, 151645] and tokenizer.special_ids >= {151644, 151645}
    decoder = tokenizer.decoder(skip_special=False)
    assert "".join(map(decoder.push, [*ids, 9707])) == "<|im_start|>Hi there<|im_end|>Hello"
    assert built == []


def test_what_no_text_of_a_file_can_show_is_left_to_the_whole() -> None:
    assert not can_build_for_text(byte_level())  # lists, not a file's arrays
    assert not can_build_for_text(in_file(sentencepiece(merges=["a b"])))
    gaps = in_file(byte_level(tokens=[*byte_level()["tokenizer.ggml.tokens"], "", ""], token_type=None))
    core = build_core_for("hell", gaps, "one text")
    assert core.whole and core.encode("hell", False, True) == build_core(gaps, "whole").encode("hell", False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": ["h e", "hx"]}, r"merges holds 'hx' at"),
        ({"merges": ["h o"]}, r"merges do not fit tokenizer\.ggml\.tokens.*ho"),
        ({"tokens": ["h", "o", "h"], "token_type": None}, r"tokens holds 'h' at 0 and at 2"),
    ],
)
def test_damage_that_the_text_meets_is_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        build_core_for("ho", in_file(byte_level(bos_token_id=0, eos_token_id=0) | byte_level(**changes)), "bad.gguf")


def counted(metadata: dict[str, Any], expected: TokenizerCore) -> tuple[Tokenizer, list[str]]:
    """(a tokenizer, a list that grows when it builds the whole one)"""
    built: list[str] = []

    def build() -> TokenizerCore:
        built.append("whole")
        return expected

    return Tokenizer(build, build_for=lambda text: build_core_for(text, metadata, "one text")), built


def in_file(metadata: dict[str, Any]) -> dict[str, Any]:
    """The same metadata with lists of strings as stored in a file."""
    return {key: _array(value) if isinstance(value, list) else value for key, value in metadata.items()}


def _array(strings: list[str]) -> StringArray:
    texts = [text.encode() for text in strings]
    data = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    return locate_strings("test", np.frombuffer(data, dtype=np.uint8), len(texts))
