"""Submitted requests as their caller sees them: one as an iterator of tokens, or many awaited together."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.engine.assembler import Delivery, TextStream, choices_of
from mnemos.engine.completion import Completion, StreamedToken, Usage
from mnemos.engine.request import Request, Timings
from mnemos.engine.wakeups import LoopReader, Reader, ThreadReader
from mnemos.errors import CapacityError, MnemosError

if TYPE_CHECKING:
    from mnemos.decoding.prompt_scores import ScoredToken
    from mnemos.engine.thread import EngineThread
    from mnemos.memory.response_cache import Cached
    from mnemos.text.tokenizer import Tokenizer


class Lease:
    """Keeps an engine's thread running: the engine and every handle of its requests hold it.

    When the last holder is gone, or the interpreter exits, the thread is closed. The thread itself holds no lease.
    """

    def __init__(self, thread: EngineThread) -> None:
        self.thread = thread
        weakref.finalize(self, thread.close, False)


class Channel:
    """A request's output as the engine's thread delivers it, for any number of readers.

    Each reads from the beginning, at its own pace. Only streaming readers are woken for every delivery, those in an
    event loop once the step has made all its deliveries.
    """

    def __init__(self) -> None:
        self.items: list[Delivery] = []  # only ever appended to
        self.ended = False
        self.error: BaseException | None = None
        self.generated = 0  # tokens of all results so far
        self._unfinished: dict[int, int] = {}  # how many of them are of which result that has not ended
        self._readers: list[Reader] = []  # that stream
        self._callbacks: deque[Callable[[], None]] = deque()

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None:
        self.items.append((emitted, finished))
        for token in emitted:
            self._unfinished[token.sequence] = self._unfinished.get(token.sequence, 0) + 1
        self.generated += len(emitted)
        for end in finished:  # which says how many it has in all; some may not have been emitted before
            self.generated += len(end.tokens) - self._unfinished.pop(end.sequence, 0)
        for reader in self._readers[:]:  # they come and go in other threads
            reader.note()

    def ring(self) -> None:
        for reader in self._readers[:]:
            reader.ring()

    def end(self, error: BaseException | None) -> None:
        self.error = error
        self.ended = True
        for reader in self._readers[:]:
            reader.note()
            reader.ring()
        while self._callbacks:
            self._callbacks.popleft()()

    def at_end(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the request has ended, in the engine's thread or right away."""
        self._callbacks.append(callback)
        if self.ended:  # it may have ended before the append: the side that pops the callback calls it
            with suppress(IndexError):
                self._callbacks.popleft()()

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Inside the block, `reader` is woken after every delivery and at the end."""
        self._readers.append(reader)
        try:
            yield
        finally:
            self._readers.remove(reader)


class RequestHandle:
    """A submitted request.

    Iterate over it (`for` or `async for`) for its tokens as they arrive, or wait for `result()` or, in asyncio, `await
    handle`. Any number of threads and tasks may do so at once; each gets all the output. Leaving an iteration early or
    cancelling a waiting task cancels the request for all of them, and so does dropping the handle.
    """

    def __init__(
        self,
        lease: Lease,
        request: Request,
        channel: Channel,
        tokenizer: Tokenizer | None,
        cached: Cached | None = None,
    ) -> None:
        self.cached = cached  # why nothing was generated; None if it was
        self._lease = lease  # the thread runs as long as its results may be read
        self._request = request
        self._channel = channel
        self._tokenizer = tokenizer

    @property
    def done(self) -> bool:
        """True once the request has ended and nothing more arrives."""
        return self._channel.ended

    @property
    def timings(self) -> Timings:
        """When it was queued, when it started and when its tokens came; updated as it runs."""
        return self._request.timings

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids."""
        return self._request.prompt

    @property
    def preemptions(self) -> int:
        """How often it gave its memory to other requests and was recomputed."""
        return self._request.preemptions

    @property
    def prompt_logprobs(self) -> list[ScoredToken]:
        """`Completion.prompt_logprobs`, complete before the first token arrives."""
        return self._request.prompt_scores

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far; final once the request is done."""
        request = self._request
        return Usage(len(request.source or request.prompt), request.cached_tokens, self._channel.generated)

    def delivered(self) -> tuple[Channel, list[ScoredToken]]:
        """Where what the request delivers is found once it has ended, and the scores of its prompt."""
        return self._channel, self._request.prompt_scores

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once the request has ended, in the engine's thread or right away; it must not raise."""
        self._channel.at_end(callback)

    def cancel(self) -> None:
        """Ends the request within one step. Output so far can still be read."""
        self._lease.thread.cancel(self._request)

    def result(self) -> Completion:
        """Waits for the end. Raises the request's error; a cancelled request returns its output so far."""
        self.wait()
        return self._completion()

    def wait(self) -> None:
        """Waits for the end, successful or not. An interrupt (Ctrl-C) cancels the request."""
        self._lease.thread.check_thread()
        ended = threading.Event()
        try:
            self._channel.at_end(ended.set)
            ended.wait()
        except BaseException:
            self.cancel()
            raise

    def __iter__(self) -> Iterator[StreamedToken]:
        self._lease.thread.check_thread()
        return self._tokens()

    def _tokens(self) -> Iterator[StreamedToken]:
        channel, read, arrived = self._channel, self._reader(), threading.Event()
        try:
            with channel.reading(ThreadReader(arrived.set)):
                ended = False
                while not ended:
                    arrived.clear()
                    ended = channel.ended
                    yield from read()
                    if not ended:
                        arrived.wait()
            self._check()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[StreamedToken]:
        async for tokens in self.arrivals():
            for token in tokens:
                yield token

    async def arrivals(self) -> AsyncIterator[list[StreamedToken]]:
        """All tokens that have come since the last turn of the loop, at least one, as a list."""
        channel, read, waiting = self._channel, self._reader(), LoopReader()
        try:
            with channel.reading(waiting):
                ended = False
                while not ended:
                    waiting.clear()
                    ended = channel.ended
                    if tokens := read():
                        yield tokens
                    if not ended:
                        await waiting.wait()
            self._check()
        finally:
            self.cancel()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._result_async().__await__()

    async def _result_async(self) -> Completion:
        waiting = LoopReader()

        def wake() -> None:
            waiting.note()
            waiting.ring()

        try:
            self._channel.at_end(wake)
            await waiting.wait()
        except BaseException:
            self.cancel()
            raise
        return self._completion()

    def __del__(self) -> None:
        if not self._channel.ended:  # no name of this module: the interpreter may have cleared them while it exits
            self.cancel()

    def _reader(self) -> Callable[[], list[StreamedToken]]:
        """A function that returns the tokens that have come since its last call, at the first call all so far."""
        items, stream, known = self._channel.items, TextStream(self._tokenizer, self._request.skip_special), 0

        def read() -> list[StreamedToken]:
            nonlocal known
            tokens: list[StreamedToken] = []
            while known < len(items):
                known += 1
                tokens += stream.push(*items[known - 1])
            return tokens

        return read

    def _check(self) -> None:
        error = self._channel.error
        if isinstance(error, MnemosError):
            raise error
        if error is not None:
            raise MnemosError(f"the request failed: {type(error).__name__}: {error}") from error

    def _completion(self) -> Completion:
        self._check()
        request = self._request
        choices = choices_of(self._channel.items, self._tokenizer, request.skip_special)
        return Completion(choices, request.prompt, self.usage, request.timings, request.prompt_scores, self.cached)


Launch = Callable[[], RequestHandle]


def run_all(launches: Sequence[Launch], in_flight: int, on_done: Callable[[], None] = lambda: None) -> list[Completion]:
    """Launches requests, at most `in_flight` at once, and returns their completions in order.

    If the engine's queue is full, it waits for one of its own requests. The first error, or an interrupt, cancels all.
    `on_done` is called in the caller's thread after each request.
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
