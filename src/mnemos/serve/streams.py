"""Streams of server-sent events and of JSON lines, which say something at least every few seconds."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse

from mnemos.serve.refusal import Refusal, refusal_of

logger = logging.getLogger("mnemos.serve")
# No proxy may hold pieces back or change them.
STREAM_HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def encode(content: Any) -> str:
    """JSON on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def event_stream(
    chunks: AsyncIterator[str], ping: float, on_error: Callable[[Refusal], str], ping_text: str = ": ping\n\n"
) -> StreamingResponse:
    """A response of server-sent events.

    chunks: the events as text, ready to be sent. on_error: the last events of a stream that fails after its beginning.
    ping: seconds of silence after which a comment is sent, so that neither client nor proxy gives up.
    """
    return StreamingResponse(
        _kept_alive(chunks, ping, on_error, ping_text), media_type="text/event-stream", headers=dict(STREAM_HEADERS)
    )


def line_stream(chunks: AsyncIterator[str], on_error: Callable[[Refusal], str]) -> StreamingResponse:
    """A response of one JSON document a line."""
    return StreamingResponse(
        _kept_alive(chunks, None, on_error, ""), media_type="application/x-ndjson", headers=dict(STREAM_HEADERS)
    )


async def _kept_alive(
    chunks: AsyncIterator[str], ping: float | None, on_error: Callable[[Refusal], str], ping_text: str
) -> AsyncIterator[bytes]:
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({waiting}, timeout=ping)
            if not done:
                yield ping_text.encode()
                continue
            finished, waiting = waiting, None
            yield finished.result().encode()
    except StopAsyncIteration:
        return
    except Exception as error:
        refusal = refusal_of(error)
        if refusal.status >= 500 and not isinstance(error, Refusal):
            logger.exception("a stream failed", exc_info=error)
        yield on_error(refusal).encode()
    finally:
        if waiting is not None:
            waiting.cancel()
