"""The ASGI application: the protocols' routes behind the guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import MnemosError, needing_extra
from mnemos.serve import decisions, generate, health, own, page_api, sessions
from mnemos.serve import metrics as metrics_page
from mnemos.serve.anthropic import messages as anthropic_messages
from mnemos.serve.catalogue import Catalogue, Offer, given
from mnemos.serve.collected import Metrics
from mnemos.serve.connection import CheckedRequest
from mnemos.serve.direct import Direct
from mnemos.serve.guard import Guard
from mnemos.serve.keys import Keys
from mnemos.serve.ollama import chat as ollama_chat
from mnemos.serve.ollama import models as ollama_models
from mnemos.serve.openai import chat, completions, embeddings, responses
from mnemos.serve.openai import models as openai_models
from mnemos.serve.openai.response_store import ResponseStore
from mnemos.serve.page_files import description_files, page_files, page_routes
from mnemos.serve.refusal import Refusal, invalid, refusal_of
from mnemos.serve.settings import Settings
from mnemos.serve.state import State
from mnemos.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mnemos.serve.tracing import Tracing

IDLE_CHECK = 5.0  # seconds between two looks for models to unload
ROUTERS = (  # the busiest first: the framework tries one after the other
    chat.router,
    completions.router,
    anthropic_messages.router,
    ollama_chat.router,
    responses.router,
    health.router,
    generate.router,
    own.router,
    metrics_page.router,
    openai_models.router,
    embeddings.router,
    ollama_models.router,
    decisions.router,
    sessions.router,
    page_api.router,
)


def app(
    models: InferenceEngine | Mapping[str, InferenceEngine] | Iterable[Offer] | Catalogue,
    *,
    name: str = "model",
    settings: Settings | None = None,
    keys: Keys | None = None,
    tracer_provider: TracerProvider | None = None,
) -> Guard:
    """A plain ASGI application that serves models, to be run by any ASGI server or mounted in another application.

    models: an engine or engines by the names that requests use, which stay the caller's, or what `Catalogue` takes.
    name: what requests call a single engine.
    tracer_provider: OpenTelemetry's, which gets a span for each request; without one, `settings` say where spans go.
    """
    chosen = settings or Settings()
    if isinstance(models, InferenceEngine):
        models = {name: models}
    if isinstance(models, Mapping):
        models = [given(engine, called) for called, engine in models.items()]
    catalogue = models if isinstance(models, Catalogue) else Catalogue(models)
    inner = FastAPI(title="Mnemos", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan)
    metrics = Metrics(catalogue)
    catalogue.observe(metrics.watch)
    stored = ResponseStore(chosen.responses, chosen.responses_bytes, chosen.responses_seconds)
    inner.state.server = State(catalogue, chosen, stored, metrics)
    inner.router.route_class = CheckedRoute
    for router in ROUTERS:
        inner.include_router(router)
    page = {**page_files(), **description_files()}
    inner.router.routes.extend(page_routes(page))
    for kind in (MnemosError, Refusal, HTTPException, RequestValidationError, Exception):
        inner.add_exception_handler(kind, _refuse)
    tracing = _tracing(chosen, tracer_provider)
    direct = Direct(inner, [route for router in ROUTERS for route in router.routes])
    guard = Guard(direct, chosen, keys or Keys(), metrics, open_files=frozenset(page), tracing=tracing)
    inner.state.guard = guard
    return guard


def _tracing(settings: Settings, provider: TracerProvider | None) -> Tracing | None:
    if provider is None and settings.otlp_traces_endpoint is None:
        return None
    with needing_extra("traces need it", "otel"):
        from mnemos.serve.tracing import Tracing, exporting_to

        return Tracing(provider) if provider is not None else exporting_to(settings.otlp_traces_endpoint or "")


class CheckedRoute(APIRoute):
    """A route whose handler gets the body that the guard parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handler(CheckedRequest(request.scope, request.receive))

        return checked


@asynccontextmanager
async def _lifespan(inner: FastAPI) -> AsyncIterator[None]:
    server: State = inner.state.server
    catalogue = server.catalogue
    tasks = [
        asyncio.create_task(_unload_idle(catalogue)),
        asyncio.create_task(_load_first(inner.state.guard, catalogue)),
    ]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.to_thread(catalogue.close)
    if inner.state.guard.tracing is not None:
        await asyncio.to_thread(inner.state.guard.tracing.close)
    await asyncio.to_thread(server.responses.close)


async def _load_first(guard: Guard, catalogue: Catalogue) -> None:
    """Loads the default model before anybody asks. If the only model fails, that is the end of the server."""
    if catalogue.default is None:
        return
    try:
        await catalogue.load(None)
    except Refusal as refusal:
        if len(catalogue.models) == 1 and guard.on_failure is not None and isinstance(refusal.__cause__, Exception):
            guard.failure = refusal.__cause__
            guard.on_failure()


async def _unload_idle(catalogue: Catalogue) -> None:
    while True:
        await asyncio.sleep(IDLE_CHECK)
        await catalogue.unload_idle()


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Every error in the protocol's own form."""
    if isinstance(error, RequestValidationError):
        refusal = invalid(error.errors())
    elif isinstance(error, HTTPException):
        known = {404: "there is nothing at this path", 405: f"{request.method} is not possible at this path"}
        refusal = Refusal(error.status_code, known.get(error.status_code, str(error.detail)))
    else:
        refusal = refusal_of(error)
    headers = refusal.headers() | dict((error.headers if isinstance(error, HTTPException) else None) or {})
    return JSONResponse(refusal.body(request.url.path), refusal.status, headers)
