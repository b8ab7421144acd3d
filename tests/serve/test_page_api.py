"""What the page gets from the server besides the protocols: itself, the settings and the live figures."""

from __future__ import annotations

import json
from typing import Any

import httpx

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.keys import Keys
from tests.serve.running import running


def first_look(client: httpx.Client) -> dict[str, Any]:
    with client.stream("GET", "/engine/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    model: dict[str, Any] = json.loads(line.removeprefix("data: "))["models"][0]
    return model


def test_the_page_is_open_and_the_rest_asks_for_the_key(engine: InferenceEngine) -> None:
    with running(app(engine, keys=Keys(["secret"]))) as client:
        page = client.get("/")
        assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert client.get("/page/js/main.js").headers["content-type"].startswith("text/javascript")
        assert client.post("/").status_code == 401
        for path in ("/generation-fields", "/engine/live", "/page/", "/page/js/nothing.js", "/page/vendor/README.md"):
            assert client.get(path).status_code == 401
        assert client.get("/page/index.html", headers={"x-api-key": "secret"}).status_code == 404


def test_the_settings_are_described(client: httpx.Client) -> None:
    names = [field["name"] for field in client.get("/generation-fields").json()]
    assert {"temperature", "num_beams", "penalty_alpha", "stop"} <= set(names)


def test_the_live_figures_are_the_engines(client: httpx.Client, engine: InferenceEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    now, stats = first_look(client), engine.stats()
    assert now["loaded"] and now["id"] == "smollm2"
    assert (now["running"], now["waiting"]) == (0, 0)
    assert now["pages_used"] + now["pages_cached"] == stats.pages_used <= now["pages_total"]
    assert now["generated_tokens"] == stats.generated_tokens >= 4
    assert now["time_to_first_token"]["median"] > 0


def test_a_server_that_stops_does_not_wait_for_those_who_watch(engine: InferenceEngine) -> None:
    guard = app(engine)
    with running(guard) as client, client.stream("GET", "/engine/live") as response:
        lines = response.iter_lines()
        next(lines)
        guard.draining = True
        assert len(list(lines)) < 8, "the stream ends by itself"
