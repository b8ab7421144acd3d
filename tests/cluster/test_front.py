"""A front passes requests and answers through as they are, and tells a replica when a client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import Message

from mnemos.cluster.front import Forwarded, Front, messages_of
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.settings import Settings
from tests.serve.running import events_of, running

BODY = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 8}


def through(engine: InferenceEngine, settings: Settings | None = None) -> Front:
    """A front whose one replica is an application in the same process."""
    replica = app(engine, name="smollm2")

    async def answer(request: Forwarded) -> AsyncIterator[Message]:
        async for messages in messages_of(replica, request.scope, request.body):
            for message in messages:
                yield message

    return Front(answer, settings or Settings())


def test_answers_are_those_of_the_replica(engine: InferenceEngine, client: httpx.Client) -> None:
    with running(through(engine)) as front:
        for path in ("/health", "/v1/models/smollm3", "/nowhere", "/"):
            ours, theirs = front.get(path), client.get(path)
            assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
        texts = [one.post("/v1/chat/completions", json=BODY).json()["choices"][0] for one in (front, client)]
        assert texts[0] == texts[1]
        events = events_of(front, "/v1/chat/completions", {**BODY, "stream": True})
        assert events[-1] == "[DONE]" and len(events) > 5
        refused = front.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
        assert refused.status_code == 400 and "JSON" in refused.json()["error"]["message"]


def test_a_client_that_leaves_leaves_the_replica(engine: InferenceEngine) -> None:
    before = engine.stats().cancelled
    with running(through(engine)) as front:
        body = {**BODY, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with front.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        end = time.monotonic() + 60
        while engine.stats().cancelled == before and time.monotonic() < end:
            time.sleep(0.01)
    assert engine.stats().cancelled == before + 1


def test_a_front_refuses_in_the_protocols_form(engine: InferenceEngine) -> None:
    front = through(engine, Settings(max_body_bytes=100))
    with running(front) as client:
        large = client.post("/v1/messages", json={"x": "y" * 200})
        assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"
        front.draining = True
        assert client.get("/v1/models").status_code == 503


def test_a_replica_that_fails_before_its_answer_is_an_error_without_details() -> None:
    async def answer(request: Forwarded) -> AsyncIterator[Message]:
        raise OSError("/secret/socket")
        yield {}

    with running(Front(answer, Settings())) as client:
        response = client.get("/v1/models")
        assert response.status_code == 500 and "secret" not in response.text


def test_messages_of_an_application_that_fails_end_with_its_error() -> None:
    async def fails(scope: object, receive: object, send: object) -> None:
        raise ValueError("x")

    async def read() -> None:
        async for _ in messages_of(fails, {"type": "http"}, b""):
            pass

    with pytest.raises(ValueError, match="x"):
        asyncio.run(read())
