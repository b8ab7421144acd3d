"""Running the application with uvicorn: listening, the first line on the screen, and stopping."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from mnemos.errors import ConfigError
from mnemos.serve.guard import Guard
from mnemos.serve.settings import LOCAL, Settings


def listen(settings: Settings) -> socket.socket:
    """A socket that listens at the address. ConfigError if that cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {settings.host} port {settings.port}: {problem}; choose another --host or --port"
        ) from error
    listener.setblocking(False)
    return listener


def address(listener: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def serve(application: Guard, listener: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Answers until a signal: then running requests get the grace period; a second signal ends at once."""
    settings = application.settings
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
    server = _Server(config, application, on_start)
    asyncio.run(server.serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """uvicorn, whose guard refuses new requests while it stops."""

    def __init__(self, config: uvicorn.Config, guard: Guard, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._guard = guard
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._guard.draining:
            self.force_exit = True
        else:
            self._guard.draining = True
            if sig == signal.SIGINT and self._guard.active:
                print(f"\nmnemos: finishing {self._guard.active} requests; Ctrl-C again ends at once", file=sys.stderr)
        self.should_exit = True


def warning(settings: Settings, has_keys: bool) -> str | None:
    """What is said loudly once: the server is open to others and asks for no key."""
    if settings.host in LOCAL or has_keys:
        return None
    return (
        f"the server listens at {settings.host} WITHOUT an API key: everyone who can reach it may use it. "
        "Set MNEMOS_API_KEY or --api-key-file FILE."
    )
