"""A request as the guard hands it on: who sent it, and whether somebody still waits for the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.types import Send

from mnemos.engine.completion import Usage
from mnemos.serve.keys import Caller
from mnemos.serve.settings import Settings


class Work(Protocol):
    """What runs in the engine for a request: a handle."""

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""

    def cancel(self) -> None:
        """Ends the work within one step."""


@dataclass(eq=False)
class Connection:
    """What the guard knows about a request. Everything runs in the event loop.

    caller    whose key it was
    settings  the server's
    send      what the guard itself answers with: a response's body may be sent past all layers between
    document  the JSON body, parsed; None without one
    notes     for the log line: the model, the numbers of tokens, ...
    """

    id: str
    caller: Caller
    settings: Settings = field(default_factory=Settings)
    send: Send | None = None
    document: Any = None
    started: float = field(default_factory=time.perf_counter)
    gone: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # of the response, set by whoever answers
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)  # closed once the answer has been sent
    works: list[Work] = field(default_factory=list)  # that the request has started
    status: int | None = None  # of the response, once it has begun
    _leaving: list[Callable[[], None]] = field(default_factory=list)

    def start(self, work: Work) -> None:
        """Work that is cancelled when the client goes away, and whose tokens are the caller's."""
        self.works.append(work)
        self.on_leave(work.cancel)

    def tokens(self) -> tuple[int, int]:
        """How many tokens of prompts and of answers the request has used."""
        usages = [work.usage for work in self.works]
        return sum(one.prompt_tokens for one in usages), sum(one.completion_tokens for one in usages)

    def on_leave(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the client goes away, at once if it is away."""
        if self.gone:
            callback()
        else:
            self._leaving.append(callback)

    def leave(self) -> None:
        """The client has gone away: whatever works for it is told."""
        self.gone = True
        leaving, self._leaving = self._leaving, []
        for callback in leaving:
            callback()


def connection_of(request: Request) -> Connection:
    """The request's connection, for handlers."""
    found: Connection = request.scope["mnemos"]
    return found


class CheckedRequest(Request):
    """A request whose JSON body the guard has parsed already."""

    async def json(self) -> Any:
        return connection_of(self).document
