"""A folder's tokenizer, converted to GGUF's metadata, encodes as before."""

from __future__ import annotations

import json
import re
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
from mnemos.text.huggingface import read_settings
from mnemos.text.llama_cpp import other_tokens
from mnemos.text.sentencepiece import metadata_with_settings
from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tokenizer_files import tokenizer_json, write_tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

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


def make(folder: Path, steps: list[Any], size: int = 700, **config: Any) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    sample = [Path(__file__).read_text(encoding="utf-8"), "1234 12345 hello world it's", *TEXTS] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=size,
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


def test_a_tokenizer_of_bytes_alone_has_no_merges(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"], size=0)
    before = Tokenizer.from_file(tmp_path)
    after = written(tokenizer_metadata(tmp_path, before.vocabulary_size), tmp_path)
    for text in TEXTS:
        assert after.encode(text, False, True) == before.encode(text, False, True), text


def train(folder: Path, **options: Any) -> None:
    """A SentencePiece model of 400 pieces, by default with merges and bytes."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sample = folder / "sample.txt"
    sample.write_text("\n".join([*TEXTS[:1], Path(__file__).read_text(encoding="utf-8")]), encoding="utf-8")
    chosen = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(input=str(sample), model_prefix=str(folder / "tokenizer"), **chosen)
    sample.unlink()


def test_sentencepiece_keeps_its_ids(tmp_path: Path) -> None:
    train(tmp_path)
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


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the content of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("text", ["<|start|>", "[user]"])
def test_an_added_token_with_a_flag_is_refused(flag: str, text: str, tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    edit(tmp_path, lambda file: next(t for t in file["added_tokens"] if t["content"] == text).update({flag: True}))
    with pytest.raises(UnsupportedError, match=rf"the added token '{re.escape(text)}' is found in a text as no token"):
        tokenizer_metadata(tmp_path, 900)


def test_a_flag_beside_sentencepiece_is_refused(tmp_path: Path) -> None:
    train(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    added = {"400": {"content": "[user]", "special": False, "lstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(UnsupportedError, match=r"lstrip of the added token '\[user\]' is true, which GGUF cannot say"):
        tokenizer_metadata(tmp_path, 401)


def test_a_token_that_another_one_begins_is_refused(tmp_path: Path) -> None:
    """The library finds special tokens first, readers of a GGUF file the longest one."""
    make(tmp_path, STEPS["gpt-2"])
    token = {"id": 701, "special": False, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    edit(tmp_path, lambda file: file["added_tokens"].append({**token, "content": "<|end|>x"}))
    with pytest.raises(UnsupportedError, match=r"the added token '<\|end\|>x' is found"):
        tokenizer_metadata(tmp_path, 900)


@pytest.mark.parametrize("kind", ["Lowercase", "NFKC", "Replace"])
def test_a_normalizer_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    made = {"type": kind} | ({"pattern": {"String": "!!!"}, "content": "!"} if kind == "Replace" else {})
    edit(tmp_path, lambda file: file.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, made]}))
    with pytest.raises(UnsupportedError, match=f"its normalizer is {kind}"):
        tokenizer_metadata(tmp_path, 900)


def test_composing_characters_is_a_warning(tmp_path: Path) -> None:
    make(tmp_path, STEPS["qwen2"])
    edit(tmp_path, lambda file: file.update(normalizer={"type": "NFC"}))
    with pytest.warns(UserWarning, match="composes characters"):
        assert tokenizer_metadata(tmp_path, 900)["tokenizer.ggml.pre"] == "qwen2"


def surround(folder: Path, *single: str) -> None:
    """Gives a tokenizer special tokens around a text, which is "A"."""
    template = processors.TemplateProcessing(
        single=[*single], special_tokens=[("<|start|>", 0), ("<|end|>", 1)] if len(single) > 1 else []
    )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = template
    tokenizer.save(str(folder / "tokenizer.json"))


def test_special_tokens_around_a_text_are_kept_or_refused(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    surround(tmp_path, "<|start|>", "$A", "<|end|>")
    before = Tokenizer.from_file(tmp_path)
    metadata = tokenizer_metadata(tmp_path, 900)
    assert (
        written(metadata, tmp_path).encode("a", True) == before.encode("a", True) == [0, *before.encode("a", False), 1]
    )
    surround(tmp_path, "<|end|>", "$A")
    with pytest.raises(UnsupportedError, match=r"encodes 'a' as \['<\|end\|>', 'a'\]; a GGUF file can have its bos"):
        tokenizer_metadata(tmp_path, 900)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert tokenizer_metadata(tmp_path, 900)["tokenizer.ggml.bos_token_id"] == 1  # as GPT-2 has one for both


def test_without_an_end_token_llama_cpp_takes_none_that_a_text_has(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"], eos_token=None, bos_token=None)
    size = Tokenizer.from_file(tmp_path).vocabulary_size
    assert tokenizer_metadata(tmp_path, size + 5)["tokenizer.ggml.eos_token_id"] == size + 4  # an unused row
    with pytest.warns(UserWarning, match=r"has no end token; llama.cpp ends a text at token 11"):
        assert "tokenizer.ggml.eos_token_id" not in tokenizer_metadata(tmp_path, size)


def test_an_end_tokens_name_as_ordinary_text_is_a_warning(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    edit(tmp_path, lambda file: file["model"]["vocab"].update({"</s>": file["model"]["vocab"].pop("\u0101")}))
    with pytest.warns(UserWarning, match="has '</s>' as ordinary text, for which llama.cpp takes special tokens"):
        tokenizer_metadata(tmp_path, 900)


def test_missing_bytes_are_a_warning(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    edit(tmp_path, lambda file: file["model"]["vocab"].update({"[gone]": file["model"]["vocab"].pop("\u0101")}))
    with pytest.warns(UserWarning, match="has no tokens for 1 of the 256 bytes, such as 1;"):
        tokenizer_metadata(tmp_path, 900)


def test_named_templates_are_listed(tmp_path: Path) -> None:
    templates = {"default": "{{ 'odd \u2581 \U0001f600' }}\r\n", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    make(tmp_path, STEPS["gpt-2"], chat_template=listed)
    metadata = tokenizer_metadata(tmp_path, 900)
    assert metadata["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert metadata["tokenizer.chat_template"] == templates["default"]
    assert metadata["tokenizer.chat_template.tool_use"] == templates["tool_use"]


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    "options, because",
    [
        (IDENTITY, None),
        (IDENTITY | {"model_type": "unigram", "byte_fallback": False}, None),
        ({}, "does not normalize text"),
        (IDENTITY | {"remove_extra_whitespaces": True}, "keeps all spaces"),
        (IDENTITY | {"byte_fallback": False}, "needs all 256 bytes as tokens"),
        (IDENTITY | {"model_type": "unigram"}, "does not spell unknown characters in bytes"),
    ],
)
def test_what_llama_cpp_would_encode_otherwise_is_known(
    options: dict[str, Any], because: str | None, tmp_path: Path
) -> None:
    train(tmp_path, **options)
    found = other_tokens(tokenizer_metadata(tmp_path, 500))
    assert found is None if because is None else found is not None and because in found


def test_a_tokenizer_json_counts_where_llama_cpp_cannot_apply_the_model_beside_it(tmp_path: Path) -> None:
    """As transformers writes it, which takes no normalization from a Llama's tokenizer.model."""
    train(tmp_path, **IDENTITY)
    metadata = metadata_with_settings(tmp_path / "tokenizer.model", read_settings(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(metadata, "tokenizer")))
    train(tmp_path)
    found = tokenizer_metadata(tmp_path, 400)
    assert other_tokens(found) is None
    before, after = Tokenizer.from_file(tmp_path), written(found, tmp_path)
    for text in [*TEXTS, "\u00b2 \ufb01 a  b"]:
        assert after.encode(text, True) == before.encode(text, True), text


def test_dropout_is_refused(tmp_path: Path) -> None:
    make(tmp_path, STEPS["gpt-2"])
    edit(tmp_path, lambda file: file["model"].update(dropout=0.1))
    with pytest.raises(UnsupportedError, match=r"its model's dropout is 0\.1; expected none"):
        tokenizer_metadata(tmp_path, 900)


def test_sentencepiece_without_a_beginning_token_gets_none(tmp_path: Path) -> None:
    train(tmp_path, bos_id=-1, eos_id=1, **IDENTITY)
    metadata = tokenizer_metadata(tmp_path, 400)
    assert metadata["tokenizer.ggml.add_bos_token"] is False and "tokenizer.ggml.bos_token_id" not in metadata
    assert written(metadata, tmp_path).encode("a", True) == Tokenizer.from_file(tmp_path).encode("a", True)


def test_a_metaspace_that_adds_no_second_space_is_a_warning(tmp_path: Path) -> None:
    """As transformers writes Llama's and Mistral's: only texts that begin with a space differ."""
    train(tmp_path, **IDENTITY)
    metadata = metadata_with_settings(tmp_path / "tokenizer.model", read_settings(tmp_path))
    content = tokenizer_json(metadata, "tokenizer")
    content |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
    }
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="puts no space before a text that begins with one"):
        after = written(tokenizer_metadata(tmp_path, 400), tmp_path)
    before = Tokenizer.from_file(tmp_path)
    for text in TEXTS[:1]:
        assert after.encode(text, True) == before.encode(text, True)
    assert after.encode(" a") != before.encode(" a")


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
