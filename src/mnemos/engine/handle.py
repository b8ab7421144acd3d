"""Submitted requests as their caller sees them: one as an iterator of tokens, or many that are waited for together."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.engine.assembler import Assembler
from mnemos.engine.completion import Completion, StreamedToken, Usage
from mnemos.engine.request import Request, State, Timings
from mnemos.errors import CapacityError, MnemosError

if TYPE_CHECKING:
    import asyncio

    from mnemos.engine.thread import EngineThread


class Lease:
    """Keeps an engine's thread running: the engine and every handle of its requests hold it.

    When the last of them is gone, or the interpreter ends, the thread is closed. The thread itself does not hold it.
    """

    def __init__(self, thread: EngineThread) -> None:
        self.thread = thread
        weakref.finalize(self, thread.close, False)


class Channel:
    """From the engine's thread to one reader; only a reader who streams is woken for every delivery."""

    def __init__(self) -> None:
        self.items: deque[tuple[list[Emitted], list[FinishedSequence]]] = deque()
        self.ended = False
        self.error: BaseException | None = None
        self.streaming = False
        self.callbacks: deque[Callable[[], None]] = deque()
        self._event = threading.Event()
        self._wake: Callable[[], None] = self._event.set

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None:
        self.items.append((emitted, finished))
        if self.streaming:
            self._wake()

    def end(self, error: BaseException | None) -> None:
        self.error = error
        self.ended = True
        self._wake()
        while self.callbacks:
            self.callbacks.popleft()()

    def wait(self) -> None:
        """Until something new is there."""
        self._event.wait()
        self._event.clear()

    def wake_in_loop(self) -> asyncio.Event:
        """From now on the reader, a coroutine of the running event loop, waits for the returned event."""
        import asyncio  # not at the top: it would double the time that a program without it takes to start

        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(event.set)

        self._wake = wake
        return event


class RequestHandle:
    """A request on its way.

    Iterate over it (`for` or `async for`) for its tokens as they come, or wait for `result()` or, in asyncio, `await
    handle`. Leaving an iteration early cancels the request, and so does dropping the handle. One reader at a time.
    """

    def __init__(self, lease: Lease, request: Request, channel: Channel, assembler: Assembler) -> None:
        self._lease = lease  # the thread runs as long as somebody waits for its results
        self._request = request
        self._channel = channel
        self._assembler = assembler

    @property
    def done(self) -> bool:
        """True once nothing more will come."""
        return self._channel.ended

    @property
    def timings(self) -> Timings:
        """When it was queued, started, gave its tokens; filled in as it goes."""
        return self._request.timings

    @property
    def preemptions(self) -> int:
        """How often it had to give its memory to others and was recomputed."""
        return self._request.preemptions

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Has `callback` called once nothing more will come, in the engine's thread or at once; it must not raise."""
        callbacks = self._channel.callbacks
        callbacks.append(callback)
        if self._channel.ended:  # perhaps too late to be seen: whoever pops it calls it
            with suppress(IndexError):
                callbacks.popleft()()

    def cancel(self) -> None:
        """Ends the request within a step. What came so far can still be read."""
        self._lease.thread.cancel(self._request)

    def result(self) -> Completion:
        """Waits for the end. Raises the request's error; a cancelled request gives what it had so far."""
        self.wait()
        return self._completion()

    def wait(self) -> None:
        """Waits for the end, whatever it is. An interrupt (Ctrl-C) cancels the request."""
        self._lease.thread.check_thread()
        try:
            while not self._channel.ended:
                self._channel.wait()
        except BaseException:
            self.cancel()
            raise

    def __iter__(self) -> Iterator[StreamedToken]:
        self._lease.thread.check_thread()
        return self._tokens()

    def _tokens(self) -> Iterator[StreamedToken]:
        channel = self._channel
        channel.streaming = True
        try:
            while True:
                ended = channel.ended
                yield from self._arrived()
                if ended:
                    break
                channel.wait()
            self._check()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[StreamedToken]:
        channel = self._channel
        event = channel.wake_in_loop()
        channel.streaming = True
        try:
            while True:
                event.clear()
                ended = channel.ended
                for token in self._arrived():
                    yield token
                if ended:
                    break
                await event.wait()
            self._check()
        finally:
            self.cancel()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._result_async().__await__()

    async def _result_async(self) -> Completion:
        event = self._channel.wake_in_loop()
        try:
            while not self._channel.ended:
                await event.wait()
                event.clear()
        except BaseException:
            self.cancel()
            raise
        return self._completion()

    def __del__(self) -> None:
        if self._request.state is not State.ENDED:
            self.cancel()

    def _arrived(self) -> Iterator[StreamedToken]:
        items = self._channel.items
        while items:
            yield from self._assembler.stream(*items.popleft())

    def _check(self) -> None:
        error = self._channel.error
        if isinstance(error, MnemosError):
            raise error
        if error is not None:
            raise MnemosError(f"the request failed: {type(error).__name__}: {error}") from error

    def _completion(self) -> Completion:
        items, assembler, request = self._channel.items, self._assembler, self._request
        take = assembler.stream if self._channel.streaming else assembler.collect
        while items:
            take(*items.popleft())
        self._check()
        assembler.abandon()
        choices = sorted(assembler.choices, key=lambda choice: choice.index)
        generated = sum(len(choice.token_ids) for choice in choices)
        usage = Usage(len(request.source or request.prompt), request.cached_tokens, generated)
        return Completion(choices, request.prompt, usage, request.timings)


Launch = Callable[[], RequestHandle]


def run_all(launches: Sequence[Launch], in_flight: int, on_done: Callable[[], None] = lambda: None) -> list[Completion]:
    """Launches requests, at most `in_flight` at once, and returns their completions in order.

    Where the engine's queue is full, waits for one of its own. The first error, or an interrupt, cancels all. `on_done`
    is called in the caller's thread after each request.
    """
    handles: list[RequestHandle] = []
    ended: SimpleQueue[None] = SimpleQueue()
    running = 0

    def wait_for_one() -> int:
        ended.get()
        on_done()
        return running - 1

    try:
        for launch in launches:
            while running >= in_flight:
                running = wait_for_one()
            while (handle := _try(launch, may_refuse=running > 0)) is None:
                running = wait_for_one()
            handle.add_done_callback(lambda: ended.put(None))
            handles.append(handle)
            running += 1
        while running:
            running = wait_for_one()
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise


def _try(launch: Launch, may_refuse: bool) -> RequestHandle | None:
    try:
        return launch()
    except CapacityError:
        if not may_refuse:
            raise
        return None
