"""What decoding uses of a tokenizer, whether it is Mnemos' own or another library's."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol


class DecoderLike(Protocol):
    """Turns token ids into text piece by piece, never half a character."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class Vocabulary(Protocol):
    """The part of a tokenizer that grammars use."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def special_ids(self) -> Collection[int]: ...

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, continues: bool = False
    ) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class TokenizerLike(Vocabulary, Protocol):
    """The part of a tokenizer that strategies use."""

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str: ...

    def decoder(self, skip_special: bool = True, continues: bool = False) -> DecoderLike: ...
