"""What every tokenizer is reduced to, whatever file it was read from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mnemos.errors import FormatError, RequestError
from mnemos.text.encoder import Encoder

# Names of tokens that end a generation, in the chat and base models in use; llama.cpp goes by the same.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip


_NO_TOKEN = (-1, 2**32 - 1)
_MOST_BYTES = 1 << 14  # tokens whose bytes are kept: those of a text are few and come again
ANCHOR = "\x02"  # a text to continue: a byte that no token combines with others


class Spelling(Protocol):
    """How a vocabulary writes bytes."""

    def token_bytes(self, text: str) -> bytes: ...


class ByteLevelSpelling:
    """GPT-2's alphabet: each of 256 printable characters represents a byte."""

    def __init__(self) -> None:
        self._bytes = {character: bytes((byte,)) for byte, character in enumerate(byte_characters())}

    def token_bytes(self, text: str) -> bytes:
        try:
            return b"".join([self._bytes[character] for character in text])
        except KeyError:  # not of the alphabet: a token that stands for its own text
            return text.encode()


class SentencePieceSpelling:
    """U+2581 is a space and, with byte_fallback, <0x0A> a byte that is not a character on its own."""

    def __init__(self, byte_fallback: bool = True) -> None:
        self.byte_fallback = byte_fallback

    def token_bytes(self, text: str) -> bytes:
        byte = parse_byte_token(text) if self.byte_fallback else None
        return text.replace("\u2581", " ").encode() if byte is None else bytes((byte,))


class WordSpelling:
    """Tokens are words, joined by spaces."""

    def token_bytes(self, text: str) -> bytes:
        return b" " + text.encode()


@dataclass(frozen=True)
class TokenizerCore:
    """A tokenizer ready for work.

    texts          each id's text as the vocabulary spells it; an unused id has ""
    spelling       how texts of ordinary tokens spell bytes
    literal_ids    ids whose text stands for itself: special tokens and those that a user added
    silent_ids     ids that decode to nothing at all (unused slots of the vocabulary)
    special_ids    ids that are not text: left out of decoded text unless asked for
    strips_space   decoded text loses one leading space, because encoding puts one there
    strips_end     decoded text loses one trailing space, because each word's last token has one
    encoder        text to ids
    find           the id of a token by its text; None: there is none
    prefix_ids, suffix_ids   what add_special puts around a text; None: the encoder's own post-processor does it
    """

    label: str
    texts: Sequence[str]
    spelling: Spelling
    literal_ids: frozenset[int]
    silent_ids: frozenset[int]
    special_ids: frozenset[int]
    strips_space: bool
    encoder: Encoder
    find: Callable[[str], int | None]
    prefix_ids: tuple[int, ...] | None
    suffix_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unknown_id: int | None
    eos_ids: frozenset[int]
    strips_end: bool = False
    _bytes: dict[int, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._bytes.get(token_id)
        if piece is None:
            if len(self._bytes) >= _MOST_BYTES:
                self._bytes.clear()
            piece = self._bytes[token_id] = self._read_bytes(token_id)
        return piece

    def _read_bytes(self, token_id: int) -> bytes:
        if token_id < 0:
            size = len(self.texts)
            raise RequestError(f"token id {token_id} is outside of the vocabulary of {size} tokens ({self.label})")
        if token_id >= len(self.texts) or token_id in self.silent_ids:
            return b""  # the first: a model may have more rows than the tokenizer has tokens
        text = self.texts[token_id]
        return text.encode() if token_id in self.literal_ids else self.spelling.token_bytes(text)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        surrounds = add_special and self.prefix_ids is None
        try:
            ids = self.encoder.encode(text, surrounds, parse_special)
        except (FormatError, RequestError) as error:
            raise type(error)(f"{self.label}: this tokenizer cannot encode {text[:60]!r}: {error}") from error
        if not add_special or self.prefix_ids is None:
            return ids
        return [*self.prefix_ids, *ids, *self.suffix_ids]

    def encode_marked(self, text: str, mark: str, names: Sequence[str]) -> list[int]:
        """Ids of a text in which the control tokens' `names` mean those tokens, unless they have a `mark` inside."""
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 1)
        ids: list[int] = []
        clean = ""  # text for the encoder as it is, bounded by control tokens
        last = ""  # the control token before the piece, which alone decides how text after it is encoded
        for piece in re.split(f"({pattern})", text):
            if mark not in piece:
                clean += piece
                last = piece
                continue
            plain = piece.replace(mark, "")
            after = self.encode(last + "x", False, True)
            if last and self.encode(last + " x", False, True) == after:
                plain = plain.lstrip()  # it swallows white space that follows it
            restarts = not last or after[len(self.encode(last, False, True)) :] == self.encode("x", False, False)
            ids += self.encode(clean, False, True)
            ids += self.encode(plain, False, False) if restarts else self.encode_inside(plain, False)
            clean = ""
        return ids + self.encode(clean, False, True)

    def encode_inside(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text that continues other text: without the space that some tokenizers prepend."""
        if not self.strips_space:
            return self.encode(text, False, parse_special)
        anchor = self.encode(ANCHOR, False, parse_special)
        ids = self.encode(ANCHOR + text, False, parse_special)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text, False, parse_special)


def byte_characters() -> list[str]:
    """GPT-2's alphabet, one character per byte: printable Latin-1 maps to itself, the rest starts at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, following = [], 0x100
    for byte in range(256):
        characters.append(chr(byte if byte in printable else following))
        following += byte not in printable
    return characters


def parse_byte_token(text: str) -> int | None:
    """The byte that a token such as <0x0A> represents; None for any other token."""
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return None
    try:
        return int(text[3:5], 16) if text[3:5].isalnum() else None
    except ValueError:
        return None


def read_id(label: str, field: str, value: Any, size: int) -> int | None:
    """`value` as a token id; None, with a warning, if the vocabulary has no such token.

    -1, also as 32 unsigned bits, is how files say that there is none. FormatError for anything but an integer.
    """
    if type(value) is not int:
        raise FormatError(f"{label}: {field} is {str(value)[:80]!r}; it must be a token id")
    if value in _NO_TOKEN:
        return None
    if not 0 <= value < size:
        warnings.warn(f"{label}: {field} is {value}, which is ignored: the vocabulary has {size} tokens", stacklevel=2)
        return None
    return value


def read_ids(label: str, field: str, value: Any, size: int) -> list[int]:
    """The token ids of `value`, which is one, a list of them, or None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = (read_id(label, field, one, size) for one in values)
    return [token for token in ids if token is not None]
