"""A folder's tokenizer, converted to GGUF's metadata, encodes as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import writing_gguf
from mnemos.text.gguf_form import tokenizer_metadata
from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tokenizer_files import write_tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers  # noqa: E402

TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\n\tand tabs\r\n",
    "<|end|> is a token and so is [user] \u4f60\u597d \U0001f600",
    "",
]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STEPS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def make(folder: Path, steps: list[Any], **config: Any) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    sample = [Path(__file__).read_text(encoding="utf-8"), "1234 12345 hello world it's", *TEXTS] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_tokens(["[user]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "chat_template": "{{ messages[0].content }}",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def written(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a GGUF file with this metadata."""
    path = folder / "tokenizer.gguf"
    with writing_gguf(path, metadata, []):
        pass
    return Tokenizer.from_metadata(GGUFFile.open(path).metadata, str(path))


@pytest.mark.parametrize("name", STEPS)
def test_byte_level_tokenizers_keep_their_ids(name: str, tmp_path: Path) -> None:
    make(tmp_path, STEPS[name])
    before = Tokenizer.from_file(tmp_path)
    metadata = tokenizer_metadata(tmp_path, before.vocabulary_size + 3)
    assert metadata["tokenizer.ggml.pre"] == name
    after = written(metadata, tmp_path)
    for text in TEXTS:
        for special in (False, True):
            assert after.encode(text, special, True) == before.encode(text, special, True), text
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[[before.bos_id, before.eos_id]].tolist() == [3, 3]
    assert types[before.encode("[user]", False, True)].tolist() == [4]
    assert metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{before.vocabulary_size + i}]" for i in range(3)]
    assert types[-3:].tolist() == [5, 5, 5]
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_the_beginning_token_is_kept_where_it_is_added(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"], add_bos_token=True)
    assert tokenizer_metadata(tmp_path, 900)["tokenizer.ggml.add_bos_token"] is True


def test_sentencepiece_keeps_its_ids(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sample = tmp_path / "sample.txt"
    sample.write_text("\n".join([*TEXTS[:1], Path(__file__).read_text(encoding="utf-8")]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(sample), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    before = Tokenizer.from_file(tmp_path)
    metadata = tokenizer_metadata(tmp_path, before.vocabulary_size)
    assert (
        metadata["tokenizer.ggml.model"] == "llama" and len(metadata["tokenizer.ggml.scores"]) == before.vocabulary_size
    )
    after = written(metadata, tmp_path)
    for text in TEXTS:
        assert after.encode(text, True, True) == before.encode(text, True, True), text


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_a_tokenizer_json_made_of_sentencepiece_keeps_its_ids(
    name: str, vocabulary_file: Callable[[str], Path], tmp_path: Path
) -> None:
    path = vocabulary_file(name)
    write_tokenizer(Checkpoint("gguf", path, dict(GGUFFile.open(path).metadata), {}), tmp_path)
    before = Tokenizer.from_file(tmp_path)
    metadata = tokenizer_metadata(tmp_path, before.vocabulary_size)
    assert metadata["tokenizer.ggml.model"] == "llama" and metadata["tokenizer.ggml.token_type"][13] == 6
    assert ("general.name" in metadata) == (name == "phi-3")  # whose tokens swallow white space, which only that says
    after = written(metadata, tmp_path)
    for text in [*TEXTS, "a <|end|> b<s> c"]:
        for special in (False, True):
            assert after.encode(text, special, True) == before.encode(text, special, True), text
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)


def test_an_added_token_that_takes_white_space_is_refused(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][0]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UnsupportedError, match=r"the added token '<\|start\|>' takes or leaves the white space beside it"
    ):
        tokenizer_metadata(tmp_path, 900)


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n")
    with pytest.raises(UnsupportedError, match="its tokenizer cannot be converted to GGUF"):
        tokenizer_metadata(tmp_path, 10)
    make(tmp_path, [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), *STEPS["gpt-2"]])
    with pytest.raises(
        UnsupportedError, match=r"cuts text into words as none of the .* \(pre_tokenizer is .*\[aeiou\]"
    ):
        tokenizer_metadata(tmp_path, 900)
    make(tmp_path, STEPS["gpt-2"])
    with pytest.raises(FormatError, match=r"has \d+ tokens; the model has rows for 10"):
        tokenizer_metadata(tmp_path, 10)


def test_a_folder_without_a_tokenizer_gives_a_file_without_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no tokenizer; the GGUF file takes token ids only"):
        metadata = tokenizer_metadata(tmp_path, 10)
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.model is 'none'; the file holds no tokenizer"):
        written(metadata, tmp_path)


def test_types_are_those_of_the_file(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    assert tokenizer_metadata(tmp_path, 900)["tokenizer.ggml.token_type"].dtype == np.int32
