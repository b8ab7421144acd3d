"""A server's settings: each once, with its rule, default and help text, from which the command line is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mnemos.engine.options import Options, row
from mnemos.rules import COUNT, FLAG, one_of, real, several, text, whole
from mnemos.serve.logs import FORMATS

SECONDS = real(0, 1e9)
NAMES = several(text(255), 256)
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """How a server listens, whom it answers, and what it refuses."""

    host: str = field(default="127.0.0.1", metadata=row(text(255), "the address to listen at", "ADDRESS"))
    port: int = field(default=8000, metadata=row(whole(0, 65535), "the port; 0 takes a free one", "N"))
    cors: Sequence[str] = field(
        default=(),
        metadata=row(NAMES, "an origin whose pages may send requests, such as https://example.org", "ORIGIN"),
    )
    allow_host: Sequence[str] = field(
        default=(), metadata=row(NAMES, "a further name under which the server may be addressed", "NAME")
    )
    share_cache: bool = field(
        default=False, metadata=row(FLAG, "share cached prefixes between API keys; by default each has its own", "")
    )
    grace: float = field(
        default=10.0, metadata=row(SECONDS, "seconds that running requests get when the server stops", "S")
    )
    ping: float = field(
        default=5.0,
        metadata=row(real(0, 1e6, open_low=True), "seconds of silence after which a stream sends a ping", "S"),
    )
    uds: str | None = field(default=None, metadata=row(text(100), "a UNIX socket to listen at instead", "PATH"))
    tls_cert: str | None = field(default=None, metadata=row(text(4096), "a certificate file, for https", "FILE"))
    tls_key: str | None = field(default=None, metadata=row(text(4096), "its private key", "FILE"))
    root_path: str | None = field(
        default=None, metadata=row(text(255), "the path under which a proxy offers the server", "PATH")
    )
    log_format: str = field(default="text", metadata=row(one_of(*FORMATS), "text or json, a line each", "FORMAT"))
    otlp_traces_endpoint: str | None = field(
        default=None,
        metadata=row(text(4096), "where OpenTelemetry traces are sent, such as http://localhost:4318", "URL"),
    )
    max_connections: int = field(default=2048, metadata=row(COUNT, "most requests at once; more get 503", "N"))
    max_body_bytes: int = field(default=32 << 20, metadata=row(COUNT, "largest request body", "N"))
    max_header_bytes: int = field(default=32 << 10, metadata=row(COUNT, "largest request headers", "N"))
    header_seconds: float = field(default=10.0, metadata=row(SECONDS, "longest time for headers to arrive", "S"))
    body_seconds: float = field(default=30.0, metadata=row(SECONDS, "longest time for a body to arrive", "S"))
    request_seconds: float = field(default=3600.0, metadata=row(SECONDS, "longest time for a whole request", "S"))
    max_prompts: int = field(default=128, metadata=row(COUNT, "most prompts in one request", "N"))
    max_results: int = field(default=16, metadata=row(COUNT, "most results (n, best_of, beams) of one prompt", "N"))
    responses: str = field(
        default=":memory:",
        metadata=row(text(4096), "the SQLite file of stored responses; in memory they end with the server", "FILE"),
    )
    responses_bytes: int = field(
        default=64 << 20, metadata=row(COUNT, "size of all stored responses, above which the oldest go", "N")
    )
    responses_seconds: float = field(
        default=30 * 86400.0, metadata=row(SECONDS, "seconds for which a response is stored", "S")
    )
    session_bytes: int = field(
        default=16 << 30,
        metadata=row(whole(1, 1 << 50), "most bytes of a tenant's sessions; more get no turn", "N"),
    )

    def hosts(self) -> tuple[str, ...]:
        """The names in a Host header that are accepted; none means all."""
        local = ("localhost", "127.0.0.1", "[::1]") if self.host in LOCAL else ()
        names = (*local, *(name.lower() for name in self.allow_host))
        return names if local else tuple(self.allow_host)
