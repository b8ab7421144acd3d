"""What the guard lets through."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.keys import Keys
from mnemos.serve.settings import Settings
from tests.serve.running import running


@pytest.fixture(scope="module")
def guarded(engine: InferenceEngine) -> Iterator[httpx.Client]:
    settings = Settings(cors=["https://page.example"], max_body_bytes=10_000)
    with running(app(engine, settings=settings, keys=Keys(["secret", "other"]))) as client:
        yield client


@pytest.mark.slow
def test_every_route_but_health_needs_the_key(guarded: httpx.Client) -> None:
    paths = guarded.get("/openapi.json", headers={"x-api-key": "secret"}).json()["paths"]
    assert "/v1/chat/completions" in paths
    for path in [*paths, "/openapi.json", "/nothing"]:
        for method in ("GET", "POST"):
            code = guarded.request(method, path.replace("{name}", "x")).status_code
            assert code == (200 if path == "/health" and method == "GET" else 401), (method, path)


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer secret"}, {"x-api-key": "other"}, {"authorization": "bearer  other"}]
)
def test_a_key_may_be_sent_as_any_client_does(guarded: httpx.Client, headers: dict[str, str]) -> None:
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/health/../v1/models", "/v1/%6dodels", "/health%2f"])
def test_odd_spellings_of_a_path_lead_nowhere(guarded: httpx.Client, path: str) -> None:
    host, port = guarded.base_url.host, guarded.base_url.port
    with socket.create_connection((host, port)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(100).split()[1] in (b"404", b"401")


@pytest.mark.parametrize("host", ["evil.example", "a/?x=", "x/#", "127.0.0.1.evil.example"])
def test_a_foreign_host_is_refused(guarded: httpx.Client, host: str) -> None:
    assert guarded.get("/health", headers={"host": host}).status_code == 403


def test_pages_of_other_origins_are_refused_unless_listed(guarded: httpx.Client) -> None:
    key = {"x-api-key": "secret"}
    assert guarded.get("/v1/models", headers={"origin": "https://evil.example", **key}).status_code == 403
    listed = guarded.get("/v1/models", headers={"origin": "https://page.example", **key})
    assert listed.status_code == 200 and listed.headers["access-control-allow-origin"] == "https://page.example"
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert guarded.options("/v1/chat/completions", headers=asks).status_code == 204
    assert guarded.options("/v1/chat/completions").status_code == 401


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"x" * 20_000, {}, 413),
        (b"[" * 5000, {}, 400),
        (b"[" * 300 + b"]" * 300, {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"nope", {}, 400),
        (b'{"messages": NaN}', {}, 400),
        (b"null", {}, 400),
        (b"[]", {}, 400),
        (b'"text"', {}, 400),
        (b"", {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
    ],
)
def test_a_bad_body_is_refused(guarded: httpx.Client, body: bytes, headers: dict[str, str], status: int) -> None:
    headers = {"x-api-key": "secret", "content-type": "application/json", **headers}
    response = guarded.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_request_ids_are_checked_and_echoed(guarded: httpx.Client) -> None:
    assert guarded.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert guarded.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_request(engine: InferenceEngine, client: httpx.Client, streams: bool) -> None:
    before = engine.stats()
    fields = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "max_tokens": 1900, "stream": streams}
    body = json.dumps(fields)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: engine.stats().generated_tokens > before.generated_tokens)
    until(lambda: engine.stats().running == 0)
    after = engine.stats()
    assert after.cancelled == before.cancelled + 1 and after.generated_tokens < before.generated_tokens + 1500


def until(condition: Callable[[], bool]) -> None:
    """Waits for what other threads do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
