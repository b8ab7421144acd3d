"""The short way from the guard to the routes that generate: none of the framework's layers comes between them.

These cost a request one to two milliseconds after a pause, when nothing of them is in the processor's caches: more than
all that the server itself does before the first token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette._utils import get_route_path
from starlette.types import Receive, Scope, Send

from mnemos.serve.connection import CheckedRequest, connection_of
from mnemos.serve.refusal import invalid

_MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}


@dataclass(frozen=True)
class _Handler:
    route: APIRoute
    body: TypeAdapter[Any]
    answer: Callable[[Any, Request], Awaitable[Response]]


class Direct:
    """An ASGI application: calls handlers of a body and a request by their exact path, the framework for all else.

    inner: the framework's application, which the handlers see as theirs. What they raise is the guard's to answer.
    """

    def __init__(self, inner: FastAPI, routes: Iterable[Any]) -> None:
        self.inner = inner
        self._handlers = {
            (method, route.path): _Handler(route, TypeAdapter(kinds["body"]), route.endpoint)
            for route in routes
            if isinstance(route, APIRoute) and (kinds := _kinds(route)) is not None
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._handlers.get((scope["method"], get_route_path(scope))) if scope["type"] == "http" else None
        if found is None:
            await self.inner(scope, receive, send)
            return
        scope.update({"app": self.inner, "route": found.route, "endpoint": found.answer, "path_params": {}})
        request = CheckedRequest(scope, receive)
        response = await found.answer(_read(found.body, connection_of(request).document), request)
        await response(scope, receive, send)


def _kinds(route: APIRoute) -> dict[str, Any] | None:
    """The types of a handler's parameters, if they are a body and a request and it returns a response."""
    kinds = get_type_hints(route.endpoint)
    fits = list(kinds) == ["body", "request", "return"] and kinds["request"] is Request and kinds["return"] is Response
    return kinds if fits else None


def _read(kind: TypeAdapter[Any], document: Any) -> Any:
    """The body in its type, checked as the framework would. Refusal for what does not fit."""
    if document is None:
        raise invalid([_MISSING])
    try:
        return kind.validate_python(document, from_attributes=True)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)) from error
