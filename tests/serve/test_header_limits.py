"""Headers that arrive slowly or never end hold no connection."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mnemos.serve import header_limits
from tests.serve.running import running

SECONDS, SIZE = 0.5, 2000
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(params=["h11", "httptools"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    protocol = H11Protocol
    if request.param == "httptools":
        pytest.importorskip("httptools")
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as protocol  # type: ignore[assignment]
    monkeypatch.setattr(header_limits, "AutoHTTPProtocol", protocol)
    with running(nothing, http=header_limits.limited_protocol(SECONDS, SIZE), lifespan="off") as client:
        yield client


@pytest.fixture
def raw(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as raw:
        yield raw


def rest(raw: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    received = b""
    try:
        while part := raw.recv(4096):
            received += part
    except ConnectionError:
        pass
    return received


def test_a_connection_without_a_request_is_closed(raw: socket.socket) -> None:
    assert rest(raw) == b""


def test_headers_in_drops_are_late(client: httpx.Client, raw: socket.socket) -> None:
    began = time.monotonic()
    try:
        for byte in HEAD * 60:
            raw.sendall(bytes([byte]))
            time.sleep(0.01)
    except ConnectionError:
        pass
    assert time.monotonic() - began < 15  # and not the twenty seconds of all the drops
    assert client.get("/").status_code == 200


def test_a_later_request_of_a_connection_has_the_same_time(raw: socket.socket) -> None:
    for _ in range(6):
        raw.sendall(HEAD)
        time.sleep(SECONDS / 5)
        raw.sendall(b"\r\n")
        assert b" 200 " in raw.recv(4096)
    raw.sendall(HEAD)
    assert rest(raw).startswith(b"HTTP/1.1 408 ")


def test_headers_without_an_end_are_too_large(raw: socket.socket) -> None:
    raw.sendall(HEAD + b"A: b\r\n" * (SIZE // 6))
    assert rest(raw).startswith(b"HTTP/1.1 431 ")


def test_a_body_is_no_header(raw: socket.socket) -> None:
    """The answer came before the body, whose rest is read for a while and not answered again."""
    raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n")
    assert b" 200 " in raw.recv(4096)
    for _ in range(3):
        raw.sendall(b"x" * SIZE)
        time.sleep(0.02)
    assert b"HTTP/1.1" not in rest(raw)
