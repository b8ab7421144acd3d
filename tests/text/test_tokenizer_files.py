"""A tokenizer written for Hugging Face's libraries: the same ids and texts there, and here when it is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.errors import FormatError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tokenizer_files import write_tokenizer
from tests.text.metadata import byte_level, sentencepiece

tokenizers = pytest.importorskip("tokenizers")

VOCABULARIES = [
    "gpt-2", "llama-spm", "phi-3", "qwen2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-bpe", "starcoder"))
]  # fmt: skip
TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\n\tand tabs\r\n",
    "<s>[INST] <|im_start|>user\n<|user|> hi<|im_end|></s>",
    "\u4f60\u597d \U0001f600 na\u00efve \u0661\u0662\u0663",
    "",
]


def gguf(path: Path, metadata: dict[str, Any]) -> Checkpoint:
    return Checkpoint("gguf", path, metadata, {})


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_keep_their_ids(name: str, vocabulary_file: Callable[[str], Path], tmp_path: Path) -> None:
    from mnemos.formats.gguf import GGUFFile

    path = vocabulary_file(name)
    file = GGUFFile.open(path)
    before = Tokenizer.from_gguf(file)
    written = write_tokenizer(gguf(path, dict(file.metadata)), tmp_path)
    assert written[:3] == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    after = Tokenizer.from_file(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = before.encode(text)
        assert after.encode(text) == ids, text
        assert library.encode(text).ids == ids, text
        assert before.encode(text, False, False) == after.encode(text, False, False), text
        assert library.decode(ids) == before.decode(ids) == after.decode(ids), text
    assert (after.bos_id, after.eos_id, after.eos_ids) == (before.bos_id, before.eos_id, before.eos_ids)
    assert after.vocabulary_size == before.vocabulary_size


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_transformers_reads_the_folder(line_end: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% endfor %}\n".replace("\n", line_end)
    metadata = sentencepiece(eos_token_id=2, bos_token_id=1, padding_token_id=0, add_eos_token=True) | {
        "tokenizer.chat_template": template,
        "tokenizer.chat_template.tools": "{{ tools }}",
        "general.architecture": "llama",
        "llama.context_length": 77,
    }
    write_tokenizer(gguf(tmp_path / "model.gguf", metadata), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_metadata(metadata, "model.gguf")
    for text in [*TEXTS, "hello hello", "h</s>e"]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text)), text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 0, 0)
    assert theirs.model_max_length == 77
    assert theirs.chat_template == {"default": template, "tools": "{{ tools }}"}
    again = Tokenizer.from_file(tmp_path)
    assert (again.chat_template, again.named_templates["tools"]) == (template, "{{ tools }}")


def test_unigram_pieces_that_text_never_becomes_are_not_chosen(tmp_path: Path) -> None:
    pieces = ["<unk>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"]
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.asarray([0, 0, -2, -3, -3, -1, -0.5], np.float32),
        "tokenizer.ggml.token_type": np.asarray([2, 3, 1, 1, 1, 5, 5], np.int32),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_eos_token": True,
    }
    write_tokenizer(gguf(tmp_path / "model.gguf", metadata), tmp_path)
    before = Tokenizer.from_metadata(metadata, "model.gguf")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ab ab", "c", "a</s>b"):
        assert library.encode(text).ids == before.encode(text) == Tokenizer.from_file(tmp_path).encode(text), text


def test_tokens_that_only_pad_the_model_are_left_out(tmp_path: Path) -> None:
    metadata = byte_level()
    tokens = [*metadata["tokenizer.ggml.tokens"], "[PAD261]", "[PAD262]"]
    types = np.append(metadata["tokenizer.ggml.token_type"], np.asarray([5, 5], np.int32))
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    write_tokenizer(gguf(tmp_path / "model.gguf", metadata), tmp_path)
    assert Tokenizer.from_file(tmp_path).vocabulary_size == 261
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["vocab"]) == 261
    assert [(entry["id"], entry["special"]) for entry in content["added_tokens"]] == [(259, False), (260, True)]


def test_a_folder_s_files_are_copied_as_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    metadata = byte_level() | {"tokenizer.chat_template.x": "{{ 1 }}"}
    written = write_tokenizer(gguf(first / "model.gguf", metadata), first)
    (first / "model.safetensors").write_bytes(b"weights")
    assert sorted(write_tokenizer(Checkpoint("huggingface", first, {}, {}), second)) == sorted(written)
    for name in written:
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert not (second / "model.safetensors").exists()


def test_sentencepiece_s_file_gets_a_tokenizer_json(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (tmp_path / "sample.txt").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    trainer.train(
        input=str(tmp_path / "sample.txt"), model_prefix=str(source / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    assert write_tokenizer(Checkpoint("huggingface", source, {}, {}), out) == ["tokenizer.model", "tokenizer.json"]
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    before = Tokenizer.from_file(source)
    for text in TEXTS:
        assert library.encode(text).ids == before.encode(text), text


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no tokenizer; expected a tokenizer\.json"):
        write_tokenizer(Checkpoint("huggingface", tmp_path, {}, {}), tmp_path)
    with pytest.raises(FormatError, match=r"'\.\./up', which cannot be a file's name"):
        write_tokenizer(gguf(tmp_path / "m", byte_level() | {"tokenizer.chat_template.../up": "x"}), tmp_path)
    with pytest.raises(FormatError, match="the tokenizer cannot be written: No such file or directory"):
        write_tokenizer(gguf(tmp_path / "m", byte_level()), tmp_path / "absent")
