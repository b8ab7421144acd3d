"""Reference counts for the pages of the key/value cache, over a fixed number of page ids."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Page ids 0 to total - 1, each free or with a reference count. Pure bookkeeping: it moves no memory.

    Pages that the prefix tree holds are `cached`; one that has no other holder can be freed by eviction and counts as
    reclaimable. Low ids are allocated first, so that a cache that commits memory lazily stays small.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.references = [0] * total
        self.reclaimable = 0
        self._free = list(range(total - 1, -1, -1))
        self._cached = bytearray(total)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def free_pages(self) -> list[int]:
        """The pages that nobody holds."""
        return list(self._free)

    def allocate(self) -> int:
        """A free page, held once. The caller must have made sure that there is one."""
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Holds each page once more."""
        references, cached = self.references, self._cached
        for page in pages:
            if cached[page] and references[page] == 1:
                self.reclaimable -= 1
            references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops one hold on each page; a page without holders is free."""
        references, cached = self.references, self._cached
        for page in pages:
            references[page] -= 1
            if references[page] == 0:
                self._free.append(page)
            elif cached[page] and references[page] == 1:
                self.reclaimable += 1

    def is_shared(self, page: int) -> bool:
        """True if writing to the page would change what another holder sees: copy it first."""
        return self.references[page] > 1

    def cache(self, page: int) -> None:
        """Records that the prefix tree holds the page too, besides the sequence that filled it."""
        self.references[page] += 1
        self._cached[page] = 1

    def uncache(self, page: int) -> None:
        """Drops the prefix tree's hold on the page."""
        if self.references[page] == 1:
            self.reclaimable -= 1
        self._cached[page] = 0
        self.release((page,))
