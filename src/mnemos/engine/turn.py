"""A turn of a session while it is being generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from mnemos.engine.completion import Usage
from mnemos.engine.handle import RequestHandle

Item = TypeVar("Item")
Result = TypeVar("Result")
Arriving = TypeVar("Arriving", covariant=True)
Whole = TypeVar("Whole", covariant=True)


class Handle(Protocol[Arriving, Whole]):
    """What is being generated: a request's tokens, or a conversation's answer."""

    @property
    def usage(self) -> Usage: ...

    def cancel(self) -> None: ...

    def result(self) -> Whole: ...

    def __iter__(self) -> Iterator[Arriving]: ...


class Turn(Generic[Item, Result]):
    """A turn that is being generated: iterate over it for what arrives, or wait for `result()`.

    When its end has been read, the turn is a part of the session and on the disk. Leaving an iteration early stops the
    turn, and what it has said so far is kept; after an error, nothing of it is. `request` is what the engine runs.
    """

    def __init__(
        self,
        handle: Handle[Item, Result],
        request: RequestHandle,
        store: Callable[[Result], None],
        release: Callable[[], None],
    ) -> None:
        self.request = request
        self._handle = handle
        self._store = store
        self._release: Callable[[], None] | None = release

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far. cached_tokens: those of the session that were not read again."""
        return self._handle.usage

    def cancel(self) -> None:
        """Ends the generation within one step."""
        self._handle.cancel()

    def result(self) -> Result:
        """Waits for the end."""
        try:
            result = self._handle.result()
        except BaseException:
            self.drop()
            raise
        self.keep(result)
        return result

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._handle
        except (GeneratorExit, KeyboardInterrupt):
            self.cancel()
            self.result()
            raise
        except BaseException:
            self.drop()
            raise
        self.result()

    def keep(self, result: Result) -> None:
        """Makes the turn a part of the session, if it is none yet. FormatError if it cannot be stored."""
        release, self._release = self._release, None
        if release is not None:
            try:
                self._store(result)
            finally:
                release()

    def drop(self) -> None:
        """Stops the turn and forgets it, if it is no part of the session yet."""
        release, self._release = self._release, None
        if release is not None:
            self._handle.cancel()
            release()

    def __del__(self) -> None:
        self.drop()
