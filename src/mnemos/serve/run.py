"""Running the application with uvicorn: listening, the first line on the screen, and stopping."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import Receive, Scope, Send

from mnemos.errors import ConfigError
from mnemos.serve.header_limits import limited_protocol
from mnemos.serve.settings import LOCAL, Settings

BACKLOG = 2048  # connections that wait to be accepted
ACCEPTED = 16  # in one turn of the event loop
TICK = 1.0  # seconds
# Seconds for which a thread that reads a prompt may keep the interpreter from the event loop, which asks for it again
# after each write. Python's default of 0.005 would slow down all streams when many requests arrive.
SWITCH = 0.001


class Application(Protocol):
    """What `serve` runs: an ASGI application that can refuse new requests while those that run finish."""

    settings: Settings
    draining: bool
    active: int  # requests that run
    failure: Exception | None  # why it cannot go on
    on_failure: Callable[[], None] | None  # it calls this then

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def listen(settings: Settings) -> socket.socket:
    """A socket that listens at the address, or at the UNIX socket. ConfigError if that cannot be done."""
    if settings.uds is not None:
        family, where, place = socket.AF_UNIX, settings.uds, f"at {settings.uds}"
        if stat.S_ISSOCK(_mode(settings.uds)):  # of a server that has ended
            os.unlink(settings.uds)
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        where, place = (settings.host, settings.port), f"at {settings.host} port {settings.port}"  # type: ignore[assignment]
    # The protocol has to be named: asyncio sets TCP_NODELAY only where it is, and without that option a token waits for
    # the client's acknowledgement of the one before it, up to 40 ms.
    protocol = 0 if settings.uds is not None else socket.IPPROTO_TCP
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen {place}: {problem}; choose another --host, --port or --uds") from error
    listener.setblocking(False)
    return listener


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def address(listener: socket.socket, settings: Settings) -> str:
    """The address as a browser takes it."""
    if settings.uds is not None:
        return settings.uds
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    scheme = "https" if settings.tls_cert is not None else "http"
    return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{port}{(settings.root_path or '').rstrip('/')}"


def serve(application: Application, listener: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Answers until a signal: then running requests get the grace period; a second signal ends at once.

    Raises the error of the only model, if it cannot be loaded.
    """
    settings = application.settings
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("tls_cert and tls_key belong together; one of them is missing")
    config = uvicorn.Config(
        application,
        http=limited_protocol(settings.header_seconds, settings.max_header_bytes),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        backlog=ACCEPTED,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        root_path=(settings.root_path or "").rstrip("/"),
    )
    try:
        config.load()
    except OSError as error:  # a certificate that cannot be read
        raise ConfigError(f"tls_cert or tls_key cannot be used: {error}") from error
    server = Server(config, application, on_start)
    application.on_failure = server.stop
    sys.setswitchinterval(SWITCH)
    asyncio.run(server.serve(sockets=[listener]))
    if application.failure is not None:
        raise application.failure


class Server(uvicorn.Server):
    """uvicorn, whose application refuses new requests while it stops."""

    def __init__(self, config: uvicorn.Config, application: Application, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._application = application
        self._on_start = on_start
        self._stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has taken the number that it accepts in a turn for this one too
        self._on_start()
        notify("READY=1")

    async def main_loop(self) -> None:
        """Wakes every TICK, for the date in the headers, and at the end; uvicorn itself wakes ten times as often."""
        while not await self.on_tick(0):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), TICK)

    def stop(self) -> None:
        """Ends the server as a signal does. From any thread."""
        self._application.draining = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._application.draining:
            self.force_exit = True
        elif sig == signal.SIGINT and self._application.active:
            print(
                f"\nmnemos: finishing {self._application.active} requests; Ctrl-C again ends at once", file=sys.stderr
            )
        notify("STOPPING=1")
        self.stop()


def notify(state: str) -> None:
    """Tells the service manager about the server's state, where there is one that listens (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messenger, suppress(OSError):
        messenger.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def warning(settings: Settings, has_keys: bool) -> str | None:
    """What is said loudly once: the server is open to others and asks for no key."""
    if settings.host in LOCAL or has_keys or settings.uds is not None:
        return None
    return (
        f"the server listens at {settings.host} WITHOUT an API key: everyone who can reach it may use it. "
        "Set MNEMOS_API_KEY or --api-key-file FILE."
    )
