"""tokenizer.model files, compared with the sentencepiece library."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mnemos.errors import FormatError, UnsupportedError
from mnemos.text.tokenizer import Tokenizer

from .test_vectors import TEXTS

MORE = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\t x",
    "é\u0301 日本語 🙂 \U0010ffff",
    "</s><s> <unk>",
    "don't 12345",
    "\u2581x",
    "\t x \n y\n ",
)


def train(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    sentences = [line for text in TEXTS for line in text.splitlines() if line.strip()] * 3
    settings = defaults | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<tag>"]},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram", "vocab_size": 400},
        {"model_type": "unigram", "vocab_size": 160, "add_dummy_prefix": False, "byte_fallback": False},
        {"model_type": "unigram", "vocab_size": 400, "normalization_rule_name": "nmt_nfkc"},
        {
            "model_type": "unigram", "vocab_size": 400, "normalization_rule_name": "nmt_nfkc_cf",
            "remove_extra_whitespaces": True, "split_by_whitespace": False,
        },
    ],
)  # fmt: skip
def test_ids_and_texts_are_those_of_the_library(options: dict[str, Any], tmp_path: Path) -> None:
    library = train(tmp_path, **options)
    ours = Tokenizer.from_file(tmp_path)
    for text in [*TEXTS, *MORE]:
        ids = library.encode(text)
        assert ours.encode(text, add_special=False, parse_special=False) == ids
        if library.unk_id() not in ids:  # which the library shows as a mark
            assert ours.decode(ids) == library.decode(ids)
    assert ours.vocabulary_size == library.vocab_size()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    merges = options.get("model_type", "bpe") == "bpe"
    assert ours.encode("a") == ([1] if merges else []) + library.encode("a")
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").encode("a") == ours.encode("a")


def test_extra_white_space_is_spaces_only(tmp_path: Path) -> None:
    """Tabs and line ends stay where nothing normalizes them."""
    library = train(tmp_path, remove_extra_whitespaces=True)
    ours = Tokenizer.from_file(tmp_path)
    for text in ("\t", "\n\n\t x", " \t x \n y\n ", "  a   b  ", "\u2581x\u2581"):
        assert ours.encode(text, add_special=False, parse_special=False) == library.encode(text), text


def test_files_beside_it_count(tmp_path: Path) -> None:
    size = train(tmp_path).vocab_size()
    added = {"2": {"content": "</s>", "special": True}, str(size): {"content": "<|im_end|>", "special": True}}
    config = {"add_bos_token": False, "chat_template": "{{ eos_token }}!", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size]}))
    ours = Tokenizer.from_file(tmp_path)
    assert ours.encode("<|im_end|>") == [size]
    assert ours.eos_ids == {2, size}
    assert ours.apply_chat_template([]) == "</s>!"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([1], "added_tokens_decoder is .*it must map ids to tokens"),
        ({"9999": {"content": "x"}}, "'x' at '9999', after 600 tokens; ids must follow each other"),
        ({"one": {"content": "x"}}, "ids must follow each other"),
        ({"600": {"content": 5}}, "ids must follow each other"),
        ({"600": {"content": "</s>"}}, "'</s>' at 600, which is token 2"),
    ],
)
def test_wrong_added_tokens(added: Any, message: str, tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_file(tmp_path).prepare()


def test_other_kinds_are_named(tmp_path: Path) -> None:
    train(tmp_path, model_type="char", vocab_size=160, byte_fallback=False)
    with pytest.raises(UnsupportedError, match="model_type is char; supported are bpe and unigram"):
        Tokenizer.from_file(tmp_path).prepare()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    train(tmp_path)
    file = tmp_path / "tokenizer.model"
    content = file.read_bytes()
    chance = random.Random(0)
    tiktoken = b"IQ== 0\nIg== 1\n"  # what the original Llama 3 has under this name
    broken = [b"", tiktoken, b"\xff" * 40, b"\x08\x05", content[:5001], b"\x0a\x04\x08\x01\x10\x02"]
    for _ in range(300):
        mutated = bytearray(content[: chance.choice([len(content), 400])])
        for _ in range(3):
            mutated[chance.randrange(min(len(mutated), 300))] = chance.randrange(256)
        broken.append(bytes(mutated))
    refused = 0
    for text in broken:
        file.write_bytes(text)
        try:
            Tokenizer.from_file(tmp_path).prepare()
        except FormatError as error:
            refused += 1
            assert str(file) in str(error)
        except UnsupportedError:
            refused += 1
    assert refused > 100
    with pytest.raises(
        FormatError, match="does not exist; a tokenizer.json is needed, or SentencePiece's tokenizer.model"
    ):
        Tokenizer.from_file(tmp_path / "none")


def test_added_tokens_have_a_file_of_their_own(tmp_path: Path) -> None:
    size = train(tmp_path).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size, "</s>": 2}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    ours = Tokenizer.from_file(tmp_path)
    ids = ours.encode("<|im_start|>kalo<|im_end|>", add_special=False)
    assert (ids[0], ids[-1], ids.count(size)) == (size, size + 1, 1)
    assert (ours.eos_id, size + 1 in ours.special_ids) == (size + 1, True)


def test_a_model_without_bos_and_eos(tmp_path: Path) -> None:
    library = train(tmp_path, bos_id=-1, eos_id=-1)
    ours = Tokenizer.from_file(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (None, None)
    assert ours.encode("kalo") == library.encode("kalo")
