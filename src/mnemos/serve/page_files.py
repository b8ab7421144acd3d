"""The page's files, answered from memory under a content security policy that lets them reach this server alone."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
DESCRIPTION = Path(__file__).with_name("swagger")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_COMPRESSED = (".html", ".css", ".js", ".svg")  # a font is compressed already
# What a model writes is hostile text: what got past the sanitizer could still neither run nor tell anybody.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, answered with 304 as long as it is the same
    "vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page; read, and compressed, when it is first asked for."""

    path: Path
    policy: str = POLICY

    @cached_property
    def content(self) -> bytes:
        """Its bytes."""
        return self.path.read_bytes()

    @cached_property
    def compressed(self) -> bytes | None:
        """Its bytes in gzip's format; None for one that is compressed by itself."""
        return gzip.compress(self.content, mtime=0) if self.path.suffix in _COMPRESSED else None

    @cached_property
    def tag(self) -> str:
        """The entity tag: a digest of the content."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    def response(self, headers: Mapping[str, str]) -> Response:
        """The answer to a request with these headers."""
        own = {**HEADERS, "content-security-policy": self.policy, "etag": self.tag}
        if headers.get("if-none-match", "").removeprefix("W/") == self.tag:
            return Response(status_code=304, headers=own)
        own["content-type"] = TYPES[self.path.suffix]
        if self.compressed is not None and "gzip" in headers.get("accept-encoding", ""):
            return Response(self.compressed, headers={**own, "content-encoding": "gzip"})
        return Response(self.content, headers=own)


def page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """All files of the page by the path under which they are answered; the page itself is "/".

    Paths are looked up in this table and never become names of files, so nothing outside the folder can be reached.
    """
    files = {
        f"/page/{path.relative_to(folder).as_posix()}": PageFile(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in TYPES
    }
    return {"/": files.pop("/page/index.html"), **files}


def description_files(folder: Path = DESCRIPTION) -> dict[str, PageFile]:
    """The files of the API's description at /docs, which come from this server too."""
    policy = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI sets styles itself
    names = ("swagger-ui-bundle.js", "swagger-ui.css", "start.js")
    files = {f"/docs/{name}": PageFile(folder / name, policy) for name in names}
    return {"/docs": PageFile(folder / "index.html", policy), **files}


def page_routes(files: Mapping[str, PageFile]) -> list[Route]:
    """Routes that answer these files. They need no key: the page asks for one, and the protocols check it."""

    def route(path: str, file: PageFile) -> Route:
        async def answer(request: Request) -> Response:
            return file.response(request.headers)

        return Route(path, answer, methods=["GET"], include_in_schema=False)

    return [route(path, file) for path, file in files.items()]
