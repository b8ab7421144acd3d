"""A tokenizer used like one of transformers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mnemos.errors import ConfigError, RequestError
from mnemos.text.tokenizer import Tokenizer

from .metadata import byte_level


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_of("llama-spm")


def test_names_of_transformers(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, tokenizer.pad_id)
    assert len(tokenizer) == tokenizer.vocab_size == tokenizer.vocabulary_size == 32000
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert [1, *ids] == tokenizer.encode("Hello")
    assert tokenizer.decode([1, *ids], skip_special_tokens=False) == "<s> Hello"
    assert tokenizer.decode([1, *ids], skip_special_tokens=True) == "Hello"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(np.array(ids)) == "Hello"
    assert tokenizer.batch_decode(np.array([[1, *ids], [*ids, 2]]), skip_special_tokens=True) == ["Hello", "Hello"]


def test_a_call_encodes(tokenizer: Tokenizer) -> None:
    one = tokenizer("Hello world")
    assert one == {"input_ids": tokenizer.encode("Hello world"), "attention_mask": [1, 1, 1]}
    texts = ["Hello world", "Hello"]
    assert tokenizer(texts).input_ids == [tokenizer.encode(text) for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.input_ids.dtype == np.int64
    assert batch.input_ids[1, 1:].tolist() == tokenizer.encode("Hello")
    assert tokenizer("Hello world", max_length=1, add_special_tokens=False).input_ids == one.input_ids[-1:]
    assert tokenizer("Hello", return_tensors="np").input_ids.shape == (1, 2)


def test_forms_of_one_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello world")
    assert tokenizer.encode("Hello world", return_tensors="np").tolist() == [ids]
    assert tokenizer.encode("Hello world", truncation=True, max_length=2) == ids[-2:]
    assert tokenizer.encode("Hello world", truncation=False, max_length=2) == ids
    assert tokenizer.encode("Hello world", truncation=True) == ids
    right = tokenizer(["Hello world", "Hello"], padding="longest", padding_side="right", return_tensors="np")
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert tokenizer("Hello", padding="max_length", max_length=5).attention_mask == [0, 0, 0, 1, 1]
    with pytest.raises(ConfigError, match="padding is 'max_length' and max_length is None"):
        tokenizer("Hello", padding="max_length")
    with pytest.raises(ConfigError, match="padding_side is 'top'; expected one of 'left', 'right'"):
        tokenizer("Hello", padding_side="top")


def test_a_call_gives_tensors(tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    batch = tokenizer(["Hello world", "Hello"], padding=True, return_tensors="pt").to("cpu")
    assert batch.input_ids.shape == batch["attention_mask"].shape == (2, 3)
    assert batch.input_ids.dtype == torch.int64
    assert tokenizer.batch_decode(batch.input_ids) == ["Hello world", "Hello"]


def test_what_cannot_be_encoded_or_decoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="return_tensors is 'np' and the texts have 2 to 3 tokens; .* padding=True"):
        tokenizer(["Hello world", "Hello"], return_tensors="np")
    with pytest.raises(ConfigError, match="return_tensors is 'tf'; expected one of None, 'np', 'pt'"):
        tokenizer("Hello", return_tensors="tf")
    with pytest.raises(RequestError, match="there is no text to encode"):
        tokenizer([])
    with pytest.raises(RequestError, match=r"the token ids to decode hold \[1, 2\]; expected whole numbers"):
        tokenizer.decode([[1, 2]])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="hold 'Hello'; expected whole numbers"):
        tokenizer.decode(["Hello"])  # type: ignore[list-item]


def test_rows_that_converters_name_are_no_tokens() -> None:
    """Trailing tokens that are marked as unused pad the model's rows; others keep their ids."""
    metadata = byte_level()
    key = "tokenizer.ggml."
    padded = metadata | {
        f"{key}tokens": [*metadata[f"{key}tokens"], "[PAD261]", "<extra>", "[PAD263]", "[PAD264]"],
        f"{key}token_type": np.append(metadata[f"{key}token_type"], np.array([5, 4, 5, 5], dtype=np.int32)),
    }
    tokenizer = Tokenizer.from_metadata(padded, "model.gguf")
    assert tokenizer.vocabulary_size == len(tokenizer) == 263
    assert tokenizer.encode("<extra>") == [262]
    assert tokenizer.decode([262, 263, 264]) == "<extra>"
