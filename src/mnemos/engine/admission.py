"""Which request may run next, and which one gives way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mnemos.engine.branches import Branches
from mnemos.engine.request import Request


class Admission:
    """Decides whether a waiting request can join the running ones: at most `most` branches, if the cache has room."""

    def __init__(self, branches: Branches, most: int) -> None:
        self._branches = branches
        self.most = most
        self._refused: tuple[Request, tuple[tuple[int, ...], int]] | None = None  # a request that did not fit in this

    def fits(self, request: Request, running: Sequence[Request]) -> bool:
        """True if there are branches, pages and states for the request, with a spare page for each running one.

        A request that is alone always fits: if its needs are too large, it fails when the cache runs out.
        """
        if not running:
            return True
        branches = sum(other.strategy.max_branches for other in running)
        if branches + request.strategy.max_branches > self.most:
            return False
        available = self._branches.tables.available
        if self._refused == (request, available):
            return False
        fits = self._branches.fits(request, len(running))
        self._refused = None if fits else (request, available)
        return fits


def less_entitled(candidate: Request, running: Sequence[Request]) -> Request | None:
    """The request that is preempted for a waiting one: the last of lower priority, or of a tenant with several running.

    None if no request should give way: the candidate's tenant has its share, or every other tenant has only one
    request running.
    """
    last = running[-1]
    if last.priority > candidate.priority:
        return last
    counts = Counter(request.tenant for request in running)
    if candidate.tenant in counts:
        return None
    peers = (request for request in reversed(running) if request.priority == candidate.priority)
    return next((request for request in peers if counts[request.tenant] > 1), None)
