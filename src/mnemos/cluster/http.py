"""An ASGI request sent on over a UNIX socket, and its answer as ASGI messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import h11
from starlette.types import Message

from mnemos.cluster.front import Forwarded

# Headers that concern one connection only, and those that the server in front writes itself.
_OWN = (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"proxy-connection",
        b"content-length", b"expect")  # fmt: skip
_READ = 1 << 16


async def send_on(
    request: Forwarded, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> AsyncIterator[Message]:
    """Sends a request over a new connection, which it closes at the end, and yields the answer's messages.

    ConnectionError if the connection ends before the answer does.
    """
    connection = h11.Connection(h11.CLIENT)
    scope = request.scope
    target = scope.get("raw_path") or scope["path"].encode()
    target = target.removeprefix(scope.get("root_path", "").encode()) or b"/"
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    headers = [(name, value) for name, value in scope["headers"] if name not in _OWN]
    headers += [(b"content-length", str(len(request.body)).encode()), (b"connection", b"close")]
    if not any(name == b"host" for name, _ in headers):
        headers.append((b"host", b"localhost"))
    try:
        for part in (
            h11.Request(method=scope["method"], target=target, headers=headers),
            h11.Data(data=request.body),
            h11.EndOfMessage(),
        ):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ))
            elif isinstance(event, h11.Response):
                kept = [pair for pair in event.headers if pair[0] not in _OWN[:7] and pair[0] != b"date"]
                yield {"type": "http.response.start", "status": event.status_code, "headers": kept}
            elif isinstance(event, h11.Data):
                yield {"type": "http.response.body", "body": bytes(event.data), "more_body": True}
            elif isinstance(event, h11.EndOfMessage):
                yield {"type": "http.response.body", "body": b"", "more_body": False}
                return
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionError("the connection ended before the answer")
    except h11.RemoteProtocolError as error:
        raise ConnectionError(f"the answer broke off: {error}") from error
    finally:
        writer.close()
