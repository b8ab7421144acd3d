"""Limits of time and size for a request's headers while they arrive, which uvicorn does not have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as AutoHTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

_LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def limited_protocol(seconds: float, size: int) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, with limits.

    A connection is closed whose first request's headers are not complete `seconds` after it was made, a later
    request's after its first byte, and one that has sent more than `size` bytes without completing them. Between
    requests, uvicorn's own time limit counts.
    """

    class LimitedProtocol(AutoHTTPProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._deadline: asyncio.TimerHandle | None = None
            self._waiting = 0  # bytes of headers that are not complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._refuse, _LATE)

        def data_received(self, data: bytes) -> None:
            known = self.cycle
            super().data_received(data)
            if self.cycle is not known:  # the headers of a request are complete
                self._forget()
            elif known is None or known.response_complete:
                if known is None or not known.more_body:  # otherwise the rest of a body that nobody wants
                    self._waiting += len(data)
                if self._waiting > size:
                    self._refuse(_LARGE)
                elif self._deadline is None:
                    self._deadline = asyncio.get_running_loop().call_later(seconds, self._refuse, _LATE)

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _forget(self) -> None:
            self._waiting = 0
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, answer: bytes) -> None:
            """Closes the connection, with an answer if part of a request has arrived."""
            if not self.transport.is_closing():
                if self._waiting:
                    self.transport.write(answer)
                self.transport.close()
            self._forget()

    return LimitedProtocol
