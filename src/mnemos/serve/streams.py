"""Streams of server-sent events and of JSON lines, which say something at least every few seconds."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mnemos.serve.connection import Connection
from mnemos.serve.refusal import Refusal, refusal_of

logger = logging.getLogger("mnemos.serve")
# No proxy may hold pieces back or change them.
STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode(content: Any) -> str:
    """JSON on one line."""
    return _encoder.encode(content)


def event_stream(
    chunks: AsyncIterator[str], ping: float, on_error: Callable[[Refusal], str], ping_text: str = ": ping\n\n"
) -> StreamingResponse:
    """A response of server-sent events.

    chunks: the events as text, ready to be sent. on_error: the last events of a stream that fails after its beginning.
    ping: seconds of silence after which a comment is sent, so that neither client nor proxy gives up.
    """
    return _Stream(chunks, on_error, "text/event-stream", ping, ping_text)


def line_stream(chunks: AsyncIterator[str], on_error: Callable[[Refusal], str]) -> StreamingResponse:
    """A response of one JSON document a line."""
    return _Stream(chunks, on_error, "application/x-ndjson")


class _Stream(StreamingResponse):
    """A stream whose chunks are sent without a task for each; a timer fills the silence between them.

    What comes after the headers goes past the framework's layers, each of which would cost something for every token.
    """

    def __init__(
        self,
        chunks: AsyncIterator[str],
        on_error: Callable[[Refusal], str],
        media_type: str,
        ping: float | None = None,
        ping_text: str = "",
    ) -> None:
        super().__init__(chunks, media_type=media_type, headers=dict(STREAM_HEADERS))
        self._chunks = chunks
        self._on_error = on_error
        self._ping = ping
        self._ping_text = ping_text
        self._sent = time.monotonic()  # when something was sent last
        self._timer: asyncio.TimerHandle | None = None
        self._pinging: asyncio.Future[None] | None = None  # kept, or it might be collected before its end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("mnemos")
        self._send = connection.send if connection is not None and connection.send is not None else send
        await self.stream_response(send)  # the guard notices a client that leaves, and ends the chunks then

    async def stream_response(self, send: Send) -> None:
        """Sends everything, and the last events of a stream that fails."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._watch_silence()
        try:
            async for chunk in self._chunks:
                await self._write(chunk)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status >= 500 and not isinstance(error, Refusal):
                logger.exception("a stream failed", exc_info=error)
            await self._write(self._on_error(refusal))
        finally:
            if self._timer is not None:
                self._timer.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, text: str) -> None:
        self._sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    def _watch_silence(self) -> None:
        """Sends a ping once nothing has been sent for so long, and again after as long."""
        if self._ping is None:
            return
        now = time.monotonic()
        if now - self._sent >= self._ping:
            self._pinging = asyncio.ensure_future(self._write(self._ping_text))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._ping - (now - self._sent) % self._ping, self._watch_silence)
