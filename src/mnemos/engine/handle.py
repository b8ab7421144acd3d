"""A submitted request as its caller sees it: an iterator of tokens, in a thread or in asyncio."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.engine.assembler import Assembler
from mnemos.engine.completion import Completion, StreamedToken, Usage
from mnemos.engine.request import Request, State, Timings
from mnemos.errors import MnemosError

if TYPE_CHECKING:
    import asyncio

    from mnemos.engine.engine import InferenceEngine


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

    def __init__(self, engine: InferenceEngine, request: Request, channel: Channel, assembler: Assembler) -> None:
        self._engine = engine  # lives as long as somebody waits for its results
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
        self._engine.cancel(self._request)

    def result(self) -> Completion:
        """Waits for the end. Raises the request's error; a cancelled request gives what it had so far."""
        self.wait()
        return self._completion()

    def wait(self) -> None:
        """Waits for the end, whatever it is. An interrupt (Ctrl-C) cancels the request."""
        self._engine.check_thread()
        try:
            while not self._channel.ended:
                self._channel.wait()
        except BaseException:
            self.cancel()
            raise

    def __iter__(self) -> Iterator[StreamedToken]:
        self._engine.check_thread()
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
