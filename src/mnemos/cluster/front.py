"""The address that clients see: every request goes on to a replica as it is, and the answer back as it comes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from mnemos.cluster.prompts import prompt_of
from mnemos.serve.guard import read_all
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.settings import Settings

logger = logging.getLogger("mnemos.serve")
# What a replica needs of a scope: all of it can be sent to another process.
_SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
         "client", "server")  # fmt: skip


@dataclass(frozen=True)
class Forwarded:
    """A request on its way to a replica. prompt: what it is routed by (`cluster.prompts`)."""

    scope: dict[str, Any]
    body: bytes
    prompt: str


Answer = Callable[[Forwarded], AsyncIterator[Message]]


class Front:
    """An ASGI application without models, keys and limits of its own: those are the replicas'.

    answer: sends a request to a replica and returns its ASGI messages as they come; closing the iterator is what a
    client's leaving is to the replica.
    """

    def __init__(self, answer: Answer, settings: Settings) -> None:
        self.settings = settings
        self.draining = False
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] | None = None  # ends whoever runs the application
        self.active = 0
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
        elif scope["type"] == "http":
            self.active += 1
            try:
                await self._forward(scope, receive, send)
            finally:
                self.active -= 1
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            if self.draining:
                raise Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5)
            if self.active > self.settings.max_connections:
                raise Refusal(503, "the server has too many requests at once", code="busy", retry_after=1)
            body = await self._body(receive)
            prompt = await asyncio.to_thread(prompt_of, scope["headers"], body)
            request = Forwarded({name: scope[name] for name in _SENT if name in scope}, body, prompt)
            sending = asyncio.ensure_future(_send_all(self._answer(request), send))
            leaving = asyncio.ensure_future(_left(receive))
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not sending.done():
                sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
        except _BrokenOff as broken:
            started, error = broken.started, broken.cause
            logger.error("a replica failed: %s", error)
            if started:
                raise  # the server closes the connection, which is how a client learns it
            await _refuse(send, scope, refusal_of(error))
        except Refusal as refusal:
            await _refuse(send, scope, refusal)

    async def _body(self, receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(read_all(receive, self.settings.max_body_bytes), self.settings.body_seconds)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.settings.body_seconds:g} seconds") from None


class _BrokenOff(Exception):
    """A replica's answer failed. started: whether a part of it was sent."""

    def __init__(self, started: bool, cause: Exception) -> None:
        super().__init__(str(cause))
        self.started = started
        self.cause = cause


async def _send_all(messages: AsyncIterator[Message], send: Send) -> None:
    started = False
    try:
        async with aclosing(messages) as answer:  # type: ignore[type-var]
            async for message in answer:
                await send(message)
                started = True
    except Exception as error:
        raise _BrokenOff(started, error) from error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Send, scope: Scope, refusal: Refusal) -> None:
    body = json.dumps(refusal.body(scope["path"]), ensure_ascii=False).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers()}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


async def messages_of(app: Callable[..., Any], scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
    """What an ASGI application sends in answer to a request, as many messages at once as there are.

    Leaving the iterator early is a client that leaves.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({"asgi": {"version": "3.0", "spec_version": "2.3"}, **scope}, receive, sent.put)
        finally:
            sent.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            ended = messages[-1] is None
            if there := [message for message in messages if message is not None]:
                yield there
        await running
    finally:
        left.set()
        if not running.done():
            await asyncio.wait([running], timeout=5)
            running.cancel()
