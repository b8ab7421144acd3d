"""Who may run next, and who gives way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mnemos.engine.branches import Branches
from mnemos.engine.request import Request


class Admission:
    """Whether a waiting request can run beside those that do: at most `most` branches, and as far as the cache goes."""

    def __init__(self, branches: Branches, most: int) -> None:
        self._branches = branches
        self._most = most
        self._refused: tuple[Request | None, tuple[int, int]] = (None, (0, 0))  # who did not fit in what was available

    def fits(self, request: Request, running: Sequence[Request]) -> bool:
        """True if there are branches, pages and states for the request, with a page to spare for each that runs.

        A request that is alone always fits: if it does not, it fails when it runs out.
        """
        if not running:
            return True
        branches = sum(other.strategy.max_branches for other in running)
        if branches + request.strategy.max_branches > self._most:
            return False
        available = self._branches.tables.available
        if self._refused == (request, available):
            return False
        fits = self._branches.fits(request, len(running))
        self._refused = (None, (0, 0)) if fits else (request, available)
        return fits


def less_entitled(candidate: Request, running: Sequence[Request]) -> Request | None:
    """Who is preempted for a waiting request: the last one of lower priority, or of a tenant that has several running.

    None where nobody is: the candidate's tenant has its share, or every other tenant has only one request running.
    """
    last = running[-1]
    if last.priority > candidate.priority:
        return last
    counts = Counter(request.tenant for request in running)
    if candidate.tenant in counts:
        return None
    peers = (request for request in reversed(running) if request.priority == candidate.priority)
    return next((request for request in peers if counts[request.tenant] > 1), None)
