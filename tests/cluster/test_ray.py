"""Replicas on Ray answer as one server, and a conversation meets its cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mnemos.errors import ConfigError
from tests.serve.running import events_of

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def client(smollm2: Path) -> Iterator[httpx.Client]:
    from ray import serve

    from mnemos.serve.ray import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"smollm2": str(smollm2)}, replicas=2, context_length=1024))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
        serve.shutdown()
    finally:
        ray.shutdown()


def test_protocols_and_errors_are_the_servers(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "smollm2"
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
    events = events_of(client, "/v1/chat/completions", body)
    assert events[-1] == "[DONE]" and len(events) > 5


def test_a_conversation_meets_its_cache(client: httpx.Client) -> None:
    for number in range(4):
        messages = [{"role": "user", "content": f"Conversation {number}: " + f"word{number} " * 60}]
        cached = []
        for _ in range(3):
            answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        assert cached[1] >= 128 and cached[2] >= 128


def test_wrong_numbers_of_replicas_are_named() -> None:
    from mnemos.serve.ray import application

    for replicas in (0, (2, 1), (-1, 2)):
        with pytest.raises(ConfigError, match="replicas is"):
            application("smollm2-135m", replicas=replicas)  # type: ignore[arg-type]
