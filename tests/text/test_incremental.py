"""A stream's text is whole characters, and adds up to the text decoded at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemos.text.tokenizer import Tokenizer

from .conftest import NAMES
from .metadata import byte_level, sentencepiece

TokenizerOf = Callable[[str], Tokenizer]


@cache
def small_tokenizers() -> dict[str, Tokenizer]:
    """Vocabularies where random ids are mostly single bytes, so that invalid UTF-8 and split characters are common."""
    return {
        "byte-level": Tokenizer.from_metadata(byte_level(), "small"),
        "sentencepiece": Tokenizer.from_metadata(sentencepiece(), "small"),
        "sentencepiece without prefix": Tokenizer.from_metadata(sentencepiece(add_space_prefix=False), "small"),
    }


def check_stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool, continues: bool) -> None:
    decoder = tokenizer.decoder(skip_special, continues)
    pieces = [decoder.push(token) for token in ids]
    end = decoder.finish()
    assert "".join(pieces) + end == tokenizer.decode(ids, skip_special, continues)
    skipped = tokenizer.special_ids if skip_special else frozenset()
    raw = b"".join(tokenizer.token_bytes(token) for token in ids if token not in skipped)
    if "\ufffd" not in raw.decode("utf-8", errors="replace"):
        assert not any("\ufffd" in piece for piece in pieces)  # half a character was never shown


@given(
    st.sampled_from(["byte-level", "sentencepiece", "sentencepiece without prefix"]),
    st.lists(st.integers(0, 260), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_bytes_in_any_order(name: str, ids: list[int], skip_special: bool, continues: bool) -> None:
    check_stream(small_tokenizers()[name], ids, skip_special, continues)


@given(st.sampled_from(["byte-level", "sentencepiece"]), st.text(max_size=30), st.booleans())
def test_any_text_comes_back(name: str, text: str, skip_special: bool) -> None:
    tokenizer = small_tokenizers()[name]
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    # SentencePiece spells a space as U+2581, so it cannot tell the two apart.
    expected = text.replace("\u2581", " ") if name == "sentencepiece" else text
    assert tokenizer.decode(ids, skip_special) == expected
    check_stream(tokenizer, ids, skip_special, False)


@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies(name: str, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(name)

    @given(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=30), st.booleans(), st.booleans())
    def check(ids: list[int], skip_special: bool, continues: bool) -> None:
        check_stream(tokenizer, ids, skip_special, continues)

    check()


def test_a_character_waits_for_its_last_byte(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("llama-spm")
    ids = tokenizer.encode("\U0001f999", add_special=False)  # a llama: four byte tokens after a space
    decoder = tokenizer.decoder()
    assert [decoder.push(token) for token in ids] == ["", "", "", "", "\U0001f999"]
    assert decoder.finish() == ""


def test_half_a_character_at_the_end_is_replaced(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("llama-spm")
    ids = tokenizer.encode("\U0001f999", add_special=False)[:-1]
    decoder = tokenizer.decoder()
    assert "".join(decoder.push(token) for token in ids) == ""
    assert decoder.finish() == "\ufffd" == tokenizer.decode(ids)


def test_leading_space_is_kept_where_a_text_goes_on(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("llama-spm")
    ids = tokenizer.encode("world", add_special=False)
    assert tokenizer.decode(ids) == "world"
    assert tokenizer.decode(ids, continues=True) == " world"


def test_special_tokens_are_shown_on_request(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of("llama-bpe")
    ids = tokenizer.encode("<|begin_of_text|>Hi<|eot_id|>", add_special=False)
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>Hi<|eot_id|>"
