"""The pages of a session on their way between its file and the engine's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mnemos.contract import Cache, FillingCache
from mnemos.decoding.config import GenerationConfig
from mnemos.errors import MnemosError
from mnemos.memory.prefix import PrefixTree
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_pages import adopt, claim, collect, fill, missing, usable
from mnemos.memory.session_records import StoredPage

if TYPE_CHECKING:
    from mnemos.engine.thread import EngineThread


class SessionPages:
    """Moves a session's pages: what others may be using is touched in the engine's thread, between two steps.

    tree, cache: None if the engine caches no prefixes; then a session has no pages.
    """

    def __init__(self, thread: EngineThread, tree: PrefixTree | None, cache: Cache | None, file: SessionFile) -> None:
        self._thread = thread
        self._tree = tree
        self._cache = cache
        self._file = file
        self._salts: set[str | None] = {None}  # under which they are cached

    def load(self, prompt_ids: Sequence[int], salt: str | None) -> None:
        """Brings the pages that a prompt begins with into the cache, as far as they are stored and there is room."""
        tree, cache, file = self._tree, self._cache, self._file
        if tree is None or cache is None or not file.binding.page_bytes:
            return
        common = min(shared_length(file.tokens, prompt_ids), len(prompt_ids) - 1)
        end = usable(file.keys, tree, common // tree.page_size)
        tokens = prompt_ids[: end * tree.page_size]
        call = self._thread.call
        keys = call(partial(missing, tree, salt, tokens, end)) if end else []
        if not keys:
            return
        claimed, filled = call(partial(claim, tree, cache, salt, tokens, keys)), 0
        try:
            filled = fill(claimed, file, self._write(cache))
        finally:
            call(partial(adopt, tree, cache, salt, tokens, claimed, filled))

    def _write(self, cache: Cache) -> Callable[[int, npt.NDArray[np.uint8], int], None]:
        """Writes one of the cache's pages from any thread."""
        if isinstance(cache, FillingCache):
            return cache.fill
        return lambda page, content, group: self._thread.call(partial(cache.write, page, content, group))

    def new(self, tokens: Sequence[int], keep: int, salt: str | None) -> Iterator[StoredPage]:
        """The pages of a text that the cache has and the file has not."""
        self._salts.add(salt)
        tree, cache = self._tree, self._cache
        if tree is None or cache is None or not self._file.binding.page_bytes:
            return
        known = {key for key in self._file.keys if (key[1] + 1) * tree.page_size <= keep}
        while True:
            try:
                found = self._thread.call(partial(collect, tree, cache, salt, tokens, known))
            except MnemosError:  # the engine was closed meanwhile
                return
            if not found:
                return
            yield from found
            known |= {(page.group, page.number) for page in found}

    def forget(self, tokens: Sequence[int], keep: int) -> None:
        """Drops a text's pages after its first `keep` tokens from the cache, as far as other texts lack them."""
        tree = self._tree
        if tree is not None:
            for salt in self._salts:
                with suppress(MnemosError):  # the engine was closed
                    self._thread.call(partial(tree.forget, salt, tokens, keep // tree.page_size))


def has_usual_pages(config: GenerationConfig) -> bool:
    """Whether a turn has the pages that are stored, which an adapter or a memory of its own would change."""
    return config.adapter is None and config.memory is None


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    length = min(len(one), len(other))
    if list(one[:length]) == list(other[:length]):
        return length
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
