"""Waiting requests: by priority, then fairly between tenants, then in order of arrival."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from operator import itemgetter

from mnemos.engine.request import Request


class WaitingQueue:
    """Among equal priorities, the tenant that has been served the fewest tokens comes first.

    A tenant that had no requests starts level with the least served one that has: idle time earns no credit.
    Source: the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models".
    """

    def __init__(self) -> None:
        self._levels: dict[int, dict[str, deque[Request]]] = {}
        self._served: dict[str, float] = {}
        self._requests: dict[str, int] = {}  # each tenant's number of waiting and running requests
        self._deadlines: list[tuple[float, int, Request]] = []  # of requests that have not started, ascending
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def enter(self, request: Request) -> None:
        """Adds a new request, which counts for its tenant until `leave`."""
        if request.tenant not in self._requests:
            self._served[request.tenant] = min(self._served.values(), default=0.0)
            self._requests[request.tenant] = 0
        self._requests[request.tenant] += 1
        if request.deadline is not None:
            insort(self._deadlines, (request.deadline, request.number, request))
        self._line(request).append(request)
        self._length += 1

    def put_back(self, request: Request) -> None:
        """Makes a preempted request wait again, before all others of its tenant and priority."""
        self._line(request).appendleft(request)
        self._length += 1

    def leave(self, request: Request) -> None:
        """Called when the request has ended, running or waiting."""
        self._requests[request.tenant] -= 1
        if not self._requests[request.tenant]:
            del self._requests[request.tenant], self._served[request.tenant]

    def charge(self, tenant: str, tokens: int) -> None:
        self._served[tenant] += tokens

    def peek(self) -> Request | None:
        """The next request."""
        if not self._length:
            return None
        lines = self._levels[min(self._levels)]
        return lines[min(lines, key=self._served.__getitem__)][0]

    def remove(self, request: Request) -> None:
        """Takes a waiting request out of its line."""
        lines = self._levels[request.priority]
        line = lines[request.tenant]
        line.remove(request)
        self._length -= 1
        if request.deadline is not None:
            self._forget_deadline(request.deadline, request)
        if not line:
            del lines[request.tenant]
        if not lines:
            del self._levels[request.priority]

    def expired(self, now: float) -> list[Request]:
        """The requests that have missed their deadline to start; they stay in the queue until removed."""
        late = bisect_right(self._deadlines, now, key=itemgetter(0))
        return [request for _, _, request in self._deadlines[:late]]

    def waiting(self) -> list[Request]:
        return [request for lines in self._levels.values() for line in lines.values() for request in line]

    def _forget_deadline(self, deadline: float, request: Request) -> None:
        place = bisect_left(self._deadlines, (deadline, request.number))
        if place < len(self._deadlines) and self._deadlines[place][2] is request:
            del self._deadlines[place]

    def _line(self, request: Request) -> deque[Request]:
        return self._levels.setdefault(request.priority, {}).setdefault(request.tenant, deque())
