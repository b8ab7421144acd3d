"""What every request passes before anything else: its address, origin, key and body are checked here.

Pure ASGI, so that nothing is buffered and a client that leaves is noticed at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnemos.serve.collected import Metrics
from mnemos.serve.connection import Connection
from mnemos.serve.keys import ANYONE, Keys
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.settings import Settings
from mnemos.serve.turnstile import Turnstile

if TYPE_CHECKING:
    from mnemos.serve.tracing import Tracing

logger = logging.getLogger("mnemos.serve")
OPEN_PATHS = ("/health", "/health/")  # answered without a key
BEGINNING = 8  # requests that begin in one turn of the event loop: some milliseconds of work
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_SAFE_PATH = re.compile(rb"/(?:[A-Za-z0-9._~:@\-]+/)*[A-Za-z0-9._~:@\-]*")


class Guard:
    """The outermost layer of the application.

    open_files: paths of static files that are answered without a key. tracing: writes a span for each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: Keys,
        metrics: Metrics,
        open_files: frozenset[str] = frozenset(),
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.keys = keys
        self.metrics = metrics
        self.tracing = tracing
        self.open_paths = {*OPEN_PATHS, *open_files}
        self.draining = False
        self.failure: Exception | None = None  # why the only model cannot be loaded
        self.on_failure: Callable[[], None] | None = None  # ends whoever runs the application
        self.active = 0
        self._turnstile = Turnstile(BEGINNING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            self.active += 1
            try:
                with nullcontext() if self.tracing is None else self.tracing.request(scope):
                    await self._answer(scope, receive, send)
            finally:
                self.active -= 1
        else:  # there are no WebSockets here
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _Headers(scope)
        connection = Connection(_request_id(headers), ANYONE, self.settings, send)
        reply = _Response(send, connection, self._cors(headers))
        scope["mnemos"] = connection
        watcher: asyncio.Task[None] | None = None
        # A request that takes too long ends like one whose client left, but is answered with what there is.
        timer = asyncio.get_running_loop().call_later(self.settings.request_seconds, connection.leave)
        entered = False
        try:
            self._check_address(scope, headers)
            if scope["method"] == "OPTIONS" and headers.one("access-control-request-method") is not None:
                await reply.preflight(scope, headers)
                return
            path: str = scope["path"]
            if not (path in self.open_paths and scope["method"] in ("GET", "HEAD")):
                caller = self.keys.caller(headers.key())
                if caller is None:
                    raise Refusal(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
                connection.caller = caller
                caller.enter()
                entered = True
                connection.headers |= caller.headers()
            if self.active > self.settings.max_connections:
                raise Refusal(503, "the server has too many requests at once", code="busy", retry_after=1)
            if self.draining and path not in self.open_paths:
                raise Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5)
            body = await self._body(scope, headers, receive, connection)
            inner = _Inbox(body, receive, connection)
            watcher = asyncio.create_task(inner.watch())
            if path not in self.open_paths:
                await self._turnstile()
            await self.app(scope, inner, reply)
        except Exception as error:
            await self._refuse(error, scope, connection, reply)
        finally:
            if watcher is not None:
                watcher.cancel()
            timer.cancel()
            connection.leave()  # whatever still works for this request has nobody to answer
            await connection.stack.aclose()
            connection.status = reply.status
            used = connection.tokens()
            if entered:
                connection.caller.leave(sum(used))
            self._log(scope, connection, reply, *used)

    def _check_address(self, scope: Scope, headers: _Headers) -> None:
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        if not _SAFE_PATH.fullmatch(raw.partition(b"?")[0]) or b"/../" in raw + b"/":
            raise Refusal(404, "there is nothing at this path")
        if headers.size > self.settings.max_header_bytes:
            raise Refusal(431, f"the headers are larger than {self.settings.max_header_bytes} bytes")
        host = headers.one("host", required=scope.get("http_version") != "1.0")
        allowed = self.settings.hosts()
        if host is not None and allowed and _without_port(host) not in allowed:
            raise Refusal(403, "this Host is not allowed; start the server with --allow-host NAME to allow it")
        origin = headers.one("origin")
        if origin is not None and not self._may_come_from(origin, host):
            raise Refusal(403, "this Origin is not allowed; start the server with --cors ORIGIN to allow it")

    def _may_come_from(self, origin: str, host: str | None) -> bool:
        return origin in self.settings.cors or "*" in self.settings.cors or urlsplit(origin).netloc == host

    def _cors(self, headers: _Headers) -> dict[str, str]:
        """The headers that let a page from another origin read the answer, if that origin is listed."""
        origin = headers.first("origin")
        if origin is None or not (origin in self.settings.cors or "*" in self.settings.cors):
            return {}
        return {"access-control-allow-origin": origin, "vary": "Origin"}

    async def _body(self, scope: Scope, headers: _Headers, receive: Receive, connection: Connection) -> bytes:
        """The whole body, read and parsed within limits of size, time and nesting."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return b""
        limit = self.settings.max_body_bytes
        if headers.one("content-encoding") not in (None, "identity"):
            raise Refusal(415, "the body is compressed; send it as it is")
        stated = headers.one("content-length")
        if stated is not None and stated.isascii() and stated.isdigit() and int(stated[:20]) > limit:
            raise Refusal(413, f"the body is larger than {limit} bytes")
        try:
            with anyio.fail_after(self.settings.body_seconds):
                body = await read_all(receive, limit)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.settings.body_seconds:g} seconds") from None
        if body:
            _check_media_type(headers)
            connection.document = parse_json(body)
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"].append((b"content-type", b"application/json"))
        return body

    async def _refuse(self, error: Exception, scope: Scope, connection: Connection, reply: _Response) -> None:
        refusal = refusal_of(error)
        if refusal.status >= 500 and not isinstance(error, Refusal):
            logger.exception("a request failed", exc_info=error, extra={"request": connection.id})
        if not reply.started:
            await reply.document(refusal.status, refusal.body(scope["path"]), refusal.headers())

    def _log(
        self, scope: Scope, connection: Connection, reply: _Response, prompt_tokens: int, completion_tokens: int
    ) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.responses[method, route, str(reply.status)] += 1
        if prompt_tokens:
            connection.notes |= {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        logger.info(
            "request",
            extra={
                "request": connection.id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": reply.status,
                "seconds": round(time.perf_counter() - connection.started, 4),
                "caller": connection.caller.name,
                **connection.notes,
            },
        )


class _Headers:
    """A request's headers; one that must not be repeated is looked up with `one`."""

    def __init__(self, scope: Scope) -> None:
        self._values: dict[str, list[str]] = {}
        self.size = 0
        for name, value in scope["headers"]:
            self._values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
            self.size += len(name) + len(value) + 4

    def first(self, name: str) -> str | None:
        return next(iter(self._values.get(name, ())), None)

    def one(self, name: str, required: bool = False) -> str | None:
        found = self._values.get(name, [])
        if len(found) > 1 or (required and not found):
            raise Refusal(400, f"the header {name} must be there once; it is there {len(found)} times")
        return found[0] if found else None

    def key(self) -> str | None:
        """The API key, from any of the headers in which clients send it."""
        bearer = self.one("authorization")
        if bearer is not None:
            scheme, _, key = bearer.partition(" ")
            return key.strip() if scheme.lower() == "bearer" else None
        return self.one("x-api-key") or self.one("api-key")


class _Inbox:
    """The `receive` of the application: the body, then nothing until the client goes away."""

    def __init__(self, body: bytes, receive: Receive, connection: Connection) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._connection = connection
        self._left = asyncio.Event()

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def watch(self) -> None:
        """Waits until the client goes away, and tells everyone; the only reader of the server's messages."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._connection.leave()
        self._left.set()


class _Response:
    """The `send` of the application, which adds the headers that every response has."""

    def __init__(self, send: Send, connection: Connection, cors: dict[str, str]) -> None:
        self._send = send
        self._connection = connection
        self._cors = cors
        self.status: int | None = None

    @property
    def started(self) -> bool:
        return self.status is not None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {
                "x-request-id": self._connection.id,
                "x-content-type-options": "nosniff",
                **self._cors,
                **self._connection.headers,
            }
            known = {name for name, _ in message.get("headers", ())}
            more = [(name.encode(), value.encode("latin-1", "replace")) for name, value in own.items()]
            if b"cache-control" not in known:
                more.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)

    async def document(self, status: int, content: Any, headers: dict[str, str]) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self({"type": "http.response.start", "status": status, "headers": pairs})
        await self({"type": "http.response.body", "body": body})

    async def preflight(self, scope: Scope, headers: _Headers) -> None:
        """Answers a browser's question whether a page may send a request; its origin was checked before."""
        if headers.first("origin") is None:
            raise Refusal(400, "a preflight needs an Origin")
        allowed = {
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": headers.first("access-control-request-headers") or "*",
            "access-control-max-age": "600",
        }
        pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in allowed.items()]
        await self({"type": "http.response.start", "status": 204, "headers": pairs})
        await self({"type": "http.response.body", "body": b""})


def parse_json(body: bytes, deepest: int = 200) -> Any:
    """A JSON document.

    Refusal for anything else, for NaN and numbers beyond the range of float64, for text with half of a surrogate pair,
    which no answer could repeat, and for more nesting than `deepest`.
    """
    try:
        document = json.loads(body, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise Refusal(400, f"the body is nested more than {deepest} levels deep") from None
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > deepest:
            raise Refusal(400, f"the body is nested more than {deepest} levels deep")
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    if b"\\ud" in body or b"\\uD" in body:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise Refusal(400, f"the body has the lone surrogate {half}; it must be Unicode text") from None
    return document


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the range of a number")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


async def read_all(receive: Receive, limit: int) -> bytes:
    """A request's whole body. Refusal if it is larger than `limit` bytes, or its client leaves."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client left before its request was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Refusal(413, f"the body is larger than {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_media_type(headers: _Headers) -> None:
    """JSON, or what curl -d says without being told; never what a page of another site can send without asking."""
    kind = (headers.one("content-type") or "").partition(";")[0].strip().lower()
    as_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    from_a_program = headers.first("origin") is None and headers.first("sec-fetch-site") is None
    if not as_json and not (kind in ("", "application/x-www-form-urlencoded") and from_a_program):
        raise Refusal(415, f"the content type is {kind[:80]!r}; it must be application/json")


def _request_id(headers: _Headers) -> str:
    given = headers.first("x-request-id")
    return given if given and _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower()
