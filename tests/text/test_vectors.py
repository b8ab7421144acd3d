"""Real vocabularies give the ids that their own tokenizers give, and the text back."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemos.formats.gguf import GGUFFile
from mnemos.text.pretokenizers import PRE_TOKENIZERS
from mnemos.text.tokenizer import Tokenizer

from .conftest import DATA, NAMES

TokenizerOf = Callable[[str], Tokenizer]

TEXTS = (DATA / "texts.txt").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
PRE_TOKENIZED = json.loads(lzma.decompress((DATA / "pretokenizers.json.xz").read_bytes()))
# These cut raw text with U+2581 for spaces; GPT-2's vocabulary cannot show what they do.
NOT_BYTE_LEVEL = {name for name, style in PRE_TOKENIZERS.items() if not style.byte_level}


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_exact_and_decode_to_the_text(name: str, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(name)
    expected = [[int(token) for token in line.split()] for line in (DATA / f"{name}.ids").read_text().splitlines()]
    assert len(expected) == len(TEXTS) == 46
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text, add_special=False) == ids
        assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.slow
@pytest.mark.parametrize("group", PRE_TOKENIZED["groups"], ids=lambda group: group["names"][0])
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(
    group: dict[str, Any], vocabulary_file: Callable[[str], Path]
) -> None:
    metadata = dict(GGUFFile.open(vocabulary_file("gpt-2")).metadata)
    styles = {PRE_TOKENIZERS[name]: name for name in group["names"]}
    for name in styles.values():  # names that share a style need one look
        metadata["tokenizer.ggml.pre"] = name
        tokenizer = Tokenizer.from_metadata(metadata, "gpt-2")
        for text, ids in zip(PRE_TOKENIZED["texts"], group["ids"], strict=True):
            assert ids is None or tokenizer.encode(text, add_special=False, parse_special=False) == ids


def test_every_name_is_covered() -> None:
    covered = {name for group in PRE_TOKENIZED["groups"] for name in group["names"]}
    assert covered == set(PRE_TOKENIZERS) - NOT_BYTE_LEVEL


def test_smollm2_splits_digits(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_gguf(smollm2)
    assert tokenizer.vocabulary_size == 49152
    assert tokenizer.encode("hacker ethic\n n.\n\n    1. The")[-4:] == [35988, 33, 30, 378]
    year = [tokenizer.token_bytes(token) for token in tokenizer.encode("in 2024")]
    assert year == [b"in", b" ", b"2", b"0", b"2", b"4"]
    assert {2, 0} <= tokenizer.eos_ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_smollm2_prompts(smollm2: Path) -> None:
    """Prompts whose ids were made by another program (Hugging Face's tokenizers)."""
    tokenizer = Tokenizer.from_gguf(smollm2)
    prompts = json.loads((DATA / "smollm2_prompts.json").read_text(encoding="utf-8"))
    for prompt in prompts:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [("llama-bpe", {128001, 128009}), ("phi-3", {2, 32000, 32007}), ("qwen2", {151643, 151645}), ("starcoder", {0, 4})],
)
def test_every_end_of_generation_is_known(name: str, ends: set[int], tokenizer_of: TokenizerOf) -> None:
    assert tokenizer_of(name).eos_ids == ends


def test_special_tokens_in_text_are_parsed_only_on_request(tokenizer_of: TokenizerOf) -> None:
    llama = tokenizer_of("llama-bpe")
    assert llama.encode("<|eot_id|>", add_special=False) == [128009]
    written = llama.encode("<|eot_id|>", add_special=False, parse_special=False)
    assert 128009 not in written and llama.decode(written) == "<|eot_id|>"
    spm = tokenizer_of("llama-spm")
    written = spm.encode("</s>", add_special=False, parse_special=False)
    assert 2 not in written and spm.decode(written) == "</s>"


def test_bos_is_added_as_the_model_expects(tokenizer_of: TokenizerOf) -> None:
    assert tokenizer_of("llama-bpe").encode("a")[0] == 128000
    assert tokenizer_of("llama-spm").encode("") == [1]
    assert tokenizer_of("llama-spm").encode("", add_special=False) == []
    assert tokenizer_of("gpt-2").encode("") == []


def test_phi_3_swallows_spaces_behind_its_marks(tokenizer_of: TokenizerOf) -> None:
    phi = tokenizer_of("phi-3")
    assert phi.encode("<|user|>\n hi") == phi.encode("<|user|>hi")
