"""A vocabulary in the native core, as a sequence of texts and as a mapping from texts to ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from mnemos._native import Pieces


class PieceTexts(Sequence[str]):
    """The text of each id: those of `pieces`, then of tokens that were added to it, by their ids; "" for unused ids."""

    def __init__(self, pieces: Pieces, added: Mapping[int, str] | None = None) -> None:
        self._pieces = pieces
        self._added = added or {}
        self._size = max(len(pieces), max(self._added, default=-1) + 1)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        index = index + self._size if index < 0 else index
        added = self._added.get(index)
        if added is not None:
            return added
        if 0 <= index < len(self._pieces):
            return self._pieces.text(index)
        if 0 <= index < self._size:
            return ""
        raise IndexError(f"index {index} is outside of a vocabulary of {self._size} tokens")


class PieceIds(Mapping[str, int]):
    """text -> id."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def __getitem__(self, text: str) -> int:
        found = self._pieces.find(text)
        if found < 0:
            raise KeyError(text)
        return found

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and self._pieces.find(text) >= 0

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        return (self._pieces.text(i) for i in range(len(self._pieces)))
