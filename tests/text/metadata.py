"""Small tokenizers as GGUF metadata, for tests that need their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from mnemos.text.core import byte_characters


def byte_level(**changes: Any) -> dict[str, Any]:
    """256 bytes, three merged tokens and two special ones; `changes` set keys (without prefix), None removes one."""
    tokens = [*byte_characters(), "he", "ll", "hell", "<|start|>", "<|im_end|>"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1] * 259 + [4, 3], dtype=np.int32),
        "merges": ["h e", "l l", "he ll"],
        "bos_token_id": 259,
        "eos_token_id": 260,
    }
    return _named(values | changes)


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Special tokens, 256 bytes and a few words, as SentencePiece trains them."""
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "\u2581he", "\u2581hello"]
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words],
        "scores": np.array([0.0] * 259 + [-float(i) for i in range(len(words))], dtype=np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), dtype=np.int32),
    }
    return _named(values | changes)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
