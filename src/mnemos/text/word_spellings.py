"""How vocabularies of words and their parts spell text, by the decoders of a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mnemos.text.core import Spelling

# What the tokenizers library's "cleanup" changes in each token; the order counts.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class WordPieceSpelling:
    """Tokens are words, joined by spaces, or parts that continue a word and begin with `prefix`."""

    prefix: str = "##"
    cleanup: bool = True

    def token_bytes(self, text: str) -> bytes:
        """The bytes that a token adds to a text, with the space before it."""
        text = text.removeprefix(self.prefix) if text.startswith(self.prefix) else " " + text
        for given, clean in _CLEANED if self.cleanup else ():
            text = text.replace(given, clean)
        return text.encode()


class PlainSpelling:
    """Tokens are written one after the other, as in a vocabulary of characters."""

    def token_bytes(self, text: str) -> bytes:
        """The bytes that a token adds to a text."""
        return text.encode()


def word_spelling(steps: Sequence[dict[str, Any]]) -> tuple[Spelling, bool] | None:
    """(how tokens spell text, whether decoding strips one leading space), for the steps of a decoder; None: another."""
    kinds = [step["type"] for step in steps]
    if kinds == ["WordPiece"]:
        return WordPieceSpelling(steps[0].get("prefix", "##"), steps[0].get("cleanup", True)), True
    return (PlainSpelling(), False) if kinds == ["Fuse"] else None
