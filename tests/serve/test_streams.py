"""Streams: pings in silence, the last events after a failure, and chunks as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from mnemos.serve.connection import Connection
from mnemos.serve.keys import ANYONE
from mnemos.serve.refusal import Refusal
from mnemos.serve.streams import event_stream, line_stream


def sent(response: Response) -> list[str]:
    """The bodies that a response sends, in order."""
    bodies: list[str] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"].decode())

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(response({"type": "http"}, receive, send))
    return bodies


async def pieces(*texts: str, silence: float = 0.0, error: Exception | None = None) -> AsyncIterator[str]:
    for text in texts:
        await asyncio.sleep(silence)
        yield text
    if error is not None:
        raise error


def test_chunks_are_sent_one_by_one_and_the_body_ends() -> None:
    assert sent(line_stream(pieces("a\n", "b\n"), str)) == ["a\n", "b\n", ""]


def test_a_body_goes_past_the_layers_between_guard_and_response() -> None:
    through, past = [], []

    async def layered(message: Any) -> None:
        through.append(message["type"].removeprefix("http.response."))

    async def direct(message: Any) -> None:
        past.append(message["body"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "mnemos": Connection("request", ANYONE, send=direct)}
    asyncio.run(line_stream(pieces("a\n", "b\n"), str)(scope, receive, layered))
    assert past == [b"a\n", b"b\n"]
    assert through == ["start", "body"]  # whoever counts responses sees the beginning and the end


def test_a_silent_stream_pings_and_loses_nothing() -> None:
    bodies = sent(event_stream(pieces("a", "b", silence=0.2), 0.02, str, "ping"))
    assert [body for body in bodies if body != "ping"] == ["a", "b", ""]
    assert bodies[0] == "ping" and bodies.count("ping") >= 2
    assert bodies[-2:] == ["b", ""]


def test_a_failure_ends_the_stream_with_its_events() -> None:
    stream = pieces("a", error=Refusal(503, "the server is shutting down"))
    assert sent(event_stream(stream, 10, lambda refusal: f"{refusal.status}!")) == ["a", "503!", ""]


def test_an_unexpected_error_is_not_shown() -> None:
    stream = pieces("a", error=ValueError("secret"))
    bodies = sent(event_stream(stream, 10, lambda refusal: str(refusal.body("/v1/"))))
    assert "secret" not in "".join(bodies) and len(bodies) == 3
