"""How readers of an engine's output are woken: once for each step, however many of them wait in an event loop."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


class Reader(Protocol):
    """Somebody who waits for output. Both methods are called from any thread."""

    def note(self) -> None:
        """There is something to read."""

    def ring(self) -> None:
        """Wakes the reader if anything was noted."""


class ThreadReader:
    """A reader in a thread, which `wake` wakes at once."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.note = wake

    def ring(self) -> None:
        """Nothing is left to do."""


class LoopReader:
    """A reader in the running event loop, which wakes soon after `ring`. `clear` and `wait` are the loop's alone."""

    def __init__(self) -> None:
        import asyncio  # not at the top: it would double the time that a program without it takes to start

        self._bell = _bell_of(asyncio.get_running_loop())
        self._woken = False
        self._waiting: asyncio.Future[None] | None = None

    def note(self) -> None:
        """There is something to read."""
        self._bell.noted.append(self)

    def ring(self) -> None:
        """Wakes the loop, if no other reader in it has done so."""
        self._bell.ring()

    def clear(self) -> None:
        """Forgets what was noted: `wait` returns once something comes after this."""
        self._woken = False

    async def wait(self) -> None:
        """Returns when something has been noted since `clear`. One task at a time may wait."""
        if self._woken:
            return
        loop = self._bell.loop()
        assert loop is not None, "it runs this"
        self._waiting = loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def wake(self) -> None:
        """Called in the loop, after `ring`."""
        self._woken = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Bell:
    """Wakes an event loop: with one system call, and one turn of the loop, for all readers noted until that turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.noted: deque[LoopReader] = deque()
        self.loop = weakref.ref(loop)
        self._rung = False

    def ring(self) -> None:
        loop = self.loop()
        if not self.noted or self._rung or loop is None:
            return
        self._rung = True
        with suppress(RuntimeError):  # the loop is closed: there is no reader any more
            loop.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._rung = False  # first: what is noted from here on rings again
        while self.noted:
            self.noted.popleft().wake()


_bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


def _bell_of(loop: asyncio.AbstractEventLoop) -> _Bell:
    bell = _bells.get(loop)
    if bell is None:
        bell = _bells[loop] = _Bell(loop)
    return bell
