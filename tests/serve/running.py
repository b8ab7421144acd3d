"""A server in a thread of the test's process, listening at a free port."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from mnemos.serve.run import address, listen
from mnemos.serve.settings import Settings


@contextmanager
def running(application: ASGIApp, **options: Any) -> Iterator[httpx.Client]:
    """A client whose base address is the server's; options are uvicorn's."""
    listener = listen(Settings(port=0))
    server = uvicorn.Server(uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=1, **options))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        with httpx.Client(base_url=address(listener, Settings()), timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def events_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of a stream's events: JSON, or the end mark as text."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
