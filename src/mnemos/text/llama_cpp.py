"""What llama.cpp makes of a GGUF file's tokenizer that Mnemos reads: some texts become other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mnemos.text.vocabulary import PREFIX, TokenType


def other_tokens(metadata: Mapping[str, Any]) -> str | None:
    """Why llama.cpp encodes otherwise than the tokenizer in a GGUF file's metadata says; None if it does not.

    Of what Mnemos' converted files may hold; measured with llama.cpp b11549.
    """
    model = metadata.get(PREFIX + "model")
    if model not in ("llama", "t5"):
        return None
    count = int(np.count_nonzero(np.asarray(metadata[PREFIX + "token_type"]) == TokenType.BYTE))
    trims = metadata.get(PREFIX + "remove_extra_whitespaces", False)
    if model == "t5":
        if count:
            return "its unigram tokenizer does not spell unknown characters in bytes (byte_fallback)"
        if trims and not metadata.get(PREFIX + "add_space_prefix", True):
            return "its unigram tokenizer puts a space before a text where it joins spaces"
        return None
    if count < 256:
        return f"its SentencePiece tokenizer with merges needs all 256 bytes as tokens (byte_fallback), not {count}"
    if PREFIX + "precompiled_charsmap" in metadata:
        return "its SentencePiece tokenizer with merges does not normalize text (normalization_rule_name)"
    if trims:
        return "its SentencePiece tokenizer with merges keeps all spaces (remove_extra_whitespaces)"
    return None
