"""Text from a stream of tokens: whole characters only, the same text as decoding everything at once."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from mnemos.errors import RequestError, shown
from mnemos.text.core import TokenizerCore


class IncrementalDecoder:
    """Turns token ids into text one by one. Bytes that end inside a UTF-8 character wait for the rest of it;
    bytes that cannot become a character are U+FFFD.

    continues: the text continues other text, so a leading space belongs to it and is kept.
    """

    def __init__(self, core: TokenizerCore, skip_special: bool = True, continues: bool = False) -> None:
        self._core = core
        self._skipped = core.special_ids if skip_special else frozenset[int]()
        self._strips_space = core.strips_space and not continues
        self._held = b""  # a space that is no part of the text if nothing follows
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        piece = self._core.token_bytes(token_id)
        if token_id in self._skipped or not piece:
            return ""
        if self._strips_space:
            self._strips_space = False
            piece = piece.removeprefix(b" ")
        if self._core.strips_end:
            piece = self._held + piece
            self._held = b" " if piece.endswith(b" ") else b""
            piece = piece.removesuffix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What was still held back: U+FFFD if that is half a character."""
        return self._utf8.decode(b"", final=True)


def decode_tokens(core: TokenizerCore, ids: Iterable[int], skip_special: bool, continues: bool) -> str:
    """Decodes everything at once."""
    skipped = core.special_ids if skip_special else frozenset()
    pieces = [core.token_bytes(token) for token in ids]
    text = b"".join(piece for piece, token in zip(pieces, ids, strict=True) if token not in skipped)
    if core.strips_space and not continues:
        text = text.removeprefix(b" ")
    if core.strips_end:
        text = text.removesuffix(b" ")
    return text.decode("utf-8", errors="replace")


def flat_ids(ids: Any) -> list[int]:
    """Token ids, an array or a tensor (time,) of them, or one, as a list of ints. RequestError for anything else."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    values = list(values) if isinstance(values, Iterable) else [values]
    for value in values:
        if not isinstance(value, Integral):
            raise RequestError(f"the token ids to decode hold {shown(value)}; expected whole numbers, see batch_decode")
    return [int(value) for value in values]
