"""A submitted request that has a value and no text as its result, such as an embedding or a decision."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mnemos.errors import MnemosError

if TYPE_CHECKING:
    from mnemos.engine.completion import Completion, Usage
    from mnemos.engine.handle import RequestHandle

Value = TypeVar("Value")


class ValueHandle(Generic[Value]):
    """Wait for `result()` or, in asyncio, `await` it. Dropping it cancels the request.

    handle: of the request that evaluates. name: what the value is, in messages. read: makes it of what was evaluated,
    given the numbers of tokens.
    """

    def __init__(self, handle: RequestHandle, name: str, read: Callable[[Usage], Value]) -> None:
        self._handle = handle
        self._name = name
        self._read = read

    @property
    def done(self) -> bool:
        """True once it has ended, successfully or not."""
        return self._handle.done

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far; final once the request is done."""
        return self._handle.usage

    def cancel(self) -> None:
        """Ends the work within one step."""
        self._handle.cancel()

    def result(self) -> Value:
        """Waits for the value. Raises the request's error; MnemosError if it was cancelled."""
        return self._value(self._handle.result())

    def __await__(self) -> Generator[Any, None, Value]:
        return self._value((yield from self._handle.__await__()))

    def _value(self, completion: Completion) -> Value:
        if completion.finish_reason == "cancelled":
            raise MnemosError(f"the {self._name} was cancelled before it was done")
        return self._read(completion.usage)
