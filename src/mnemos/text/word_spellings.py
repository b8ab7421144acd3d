"""How vocabularies of words and their parts spell text, by the decoders of a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mnemos.text.core import Spelling, parse_byte_token

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


@dataclass(frozen=True)
class StepSpelling:
    """Tokens are written one after the other, each after these steps of a decoder.

    ("replace", old, new), ("bytes",) for tokens such as <0x0A>, and ("strip", character, at most at the beginning, at
    most at the end).
    """

    steps: tuple[tuple[Any, ...], ...]

    def token_bytes(self, text: str) -> bytes:
        """The bytes that a token adds to a text."""
        for step in self.steps:
            match step:
                case ("replace", old, new):
                    text = text.replace(old, new)
                case ("bytes",):
                    byte = parse_byte_token(text)
                    if byte is not None:
                        return bytes((byte,))
                case (_, character, first, last):
                    for _ in range(first):
                        text = text.removeprefix(character)
                    for _ in range(last):
                        text = text.removesuffix(character)
        return text.encode()


class Reading(NamedTuple):
    """How tokens spell text, and whether decoding takes one space from the text's beginning and from its end."""

    spelling: Spelling
    strips_space: bool = False
    strips_end: bool = False


def word_spelling(steps: Sequence[dict[str, Any]]) -> Reading | None:
    """What the steps of a decoder mean; None: they are not supported."""
    kinds = [step["type"] for step in steps]
    if kinds == ["WordPiece"]:
        return Reading(WordPieceSpelling(steps[0].get("prefix", "##"), steps[0].get("cleanup", True)), True)
    if kinds == ["BPEDecoder"]:
        # The last token's suffix stands for nothing, any other one for a space.
        return Reading(StepSpelling((("replace", steps[0].get("suffix", "</w>"), " "),)), strips_end=True)
    if kinds == ["Metaspace"]:
        mark, spelled = steps[0].get("replacement"), steps[0].get("prepend_scheme", "always") != "never"
        return Reading(StepSpelling((("replace", mark, " "),)), spelled) if isinstance(mark, str) else None
    return _reading(steps, kinds.index("Fuse") if "Fuse" in kinds else len(kinds))


def _reading(steps: Sequence[dict[str, Any]], fused: int) -> Reading | None:
    """What steps mean of which those before `fused` apply to each token, and those after it to the whole text."""
    spelled: list[tuple[Any, ...]] = []
    space = end = False
    for place, step in enumerate(steps):
        match step:
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                if place > fused and len(old) > 1:
                    return None  # tokens may share an occurrence
                spelled.append(("replace", old, new))
            case {"type": "ByteFallback"} if place < fused:
                spelled.append(("bytes",))
            case {"type": "Strip", "content": str(character), "start": int(first), "stop": int(last)}:
                if place < fused:
                    spelled.append(("strip", character, first, last))
                elif character != " " or first > 1 or last > 1 or place + 1 < len(steps):
                    return None
                else:
                    space, end = first == 1, last == 1
            case _:
                return None
    return Reading(StepSpelling(tuple(spelled)) if spelled else PlainSpelling(), space, end)
