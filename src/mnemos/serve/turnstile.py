"""A few requests at a time: what keeps an event loop prompt when very many arrive at once."""

from __future__ import annotations

import asyncio
from collections import deque


class Turnstile:
    """Lets at most `each` callers pass in a turn of the event loop, first come, first served.

    Between two turns the loop looks for input, so whoever need not pass waits for one turn and not for the whole crowd.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._passed = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self) -> None:
        """Returns when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        if self._passed >= self._each or self._waiting:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
            return
        if not self._passed:
            loop.call_soon(self._next_turn)
        self._passed += 1

    def _next_turn(self) -> None:
        self._passed = 0
        while self._waiting and self._passed < self._each:
            turn = self._waiting.popleft()
            if not turn.done():  # a caller that was cancelled takes no place
                turn.set_result(None)
                self._passed += 1
        if self._passed:
            asyncio.get_running_loop().call_soon(self._next_turn)
