"""Vocabularies of real models, unpacked once."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mnemos.text.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data" / "tokenizers"
NAMES = ("gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder")


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> GGUF file with that vocabulary and no weights."""
    folder = tmp_path_factory.mktemp("vocabularies")

    @cache
    def unpack(name: str) -> Path:
        file = folder / f"{name}.gguf"
        file.write_bytes(lzma.decompress((DATA / f"{name}.gguf.xz").read_bytes()))
        return file

    return unpack


@pytest.fixture(scope="session")
def tokenizer_of(vocabulary_file: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """name -> that vocabulary's tokenizer, built once."""
    return cache(lambda name: Tokenizer.from_gguf(vocabulary_file(name)))
