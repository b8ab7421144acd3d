"""Tokenizers as people write them: only encode and decode, with the gaps that they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mnemos.errors import RequestError
from mnemos.text.foreign import ForeignTokenizer, adapt_tokenizer


class Letters:
    """Ids are indices in an alphabet; anything else is a KeyError."""

    vocab_size = 5

    def __init__(self) -> None:
        self.ids = {letter: index for index, letter in enumerate("xyzäö")}

    def encode(self, text: str) -> list[int]:
        return [self.ids[letter] for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        letters = {index: letter for letter, index in self.ids.items()}
        return "".join(letters[index] for index in ids)


class Bytes:
    """Ids are bytes; decoding is strict."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def adapted(tokenizer: object) -> ForeignTokenizer:
    wrapper = adapt_tokenizer(tokenizer)
    assert isinstance(wrapper, ForeignTokenizer)
    return wrapper


def test_what_a_tokenizer_refuses_is_a_request_error_that_names_it() -> None:
    tokenizer = adapted(Letters())
    assert tokenizer.encode("zyx") == [2, 1, 0]
    with pytest.raises(RequestError, match=r"the tokenizer, a Letters, cannot encode 'xa': KeyError: 'a'"):
        tokenizer.encode("xa")
    with pytest.raises(RequestError, match=r"the tokenizer, a Letters, cannot decode \[0, -1\]: KeyError"):
        tokenizer.decode([0, -1])


@pytest.mark.parametrize(
    "returned", [[1, 2], (1, 2), [[1, 2]], np.array([1, 2]), np.array([[1, 2]]), [np.int64(1), np.int64(2)]]
)
def test_ids_in_every_form(returned: Any) -> None:
    tokenizer = Letters()
    tokenizer.encode = lambda text: returned  # type: ignore[method-assign]
    assert adapted(tokenizer).encode("x") == [1, 2]


@pytest.mark.parametrize("returned", [["x", "y"], [1.5], np.array([[1], [2]]), 5, None])
def test_what_is_no_list_of_ids_is_named(returned: Any) -> None:
    tokenizer = Letters()
    tokenizer.encode = lambda text: returned  # type: ignore[method-assign]
    with pytest.raises(RequestError, match=r"the tokenizer's encode returned (?s:.*); expected a list of token ids"):
        adapted(tokenizer).encode("x")


def test_tokens_that_only_the_model_has_have_no_text() -> None:
    tokenizer = adapted(Letters())
    assert tokenizer.decode([0, 5, 4, 99]) == "xö"
    decoder = tokenizer.decoder()
    assert [decoder.push(token) for token in (0, 7, 4)] == ["x", "", "ö"]


def test_a_strict_decoder_streams_whole_characters() -> None:
    tokenizer = adapted(Bytes())
    decoder = tokenizer.decoder()
    ids = list("aé€😀".encode())
    pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == "aé€😀"
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀"]
    assert tokenizer.decode(ids[:-1]) == "aé€\N{REPLACEMENT CHARACTER}"


class Methods(Bytes):
    """As in sentencepiece."""

    def eos_id(self) -> int:  # type: ignore[override]
        return 2

    def pad_id(self) -> int:
        return -1


def test_the_end_of_text_is_found_under_the_names_that_people_use() -> None:
    assert adapted(Bytes()).eos_ids == {0}
    assert adapted(Methods()).eos_ids == {2}
    assert adapted(Methods()).pad_id is None
    assert adapted(Letters()).eos_ids == set()


def test_tokens_without_roles_play_those_of_their_names() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "b": 2}, unk_token="a"))
    assert adapted(made).eos_ids == frozenset()  # not marked as special: text like any other
    made.add_special_tokens(["</s>", "<pad>"])
    tokenizer = adapted(made)
    assert tokenizer.eos_ids == {1} and tokenizer.pad_id == 3
    assert tokenizer.special_ids == {1, 3}
