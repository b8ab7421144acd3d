"""OpenTelemetry traces: a span for each request, with the attributes of its conventions for generative AI.

A span holds numbers, names of models and what was asked of the sampler, never a prompt or an answer.
https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import SpanKind, StatusCode, TracerProvider, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mnemos.serve.generation import Running
from mnemos.version import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from starlette.types import Scope

    from mnemos.serve.connection import Connection

SCHEMA = "https://opentelemetry.io/schemas/1.37.0"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/api/chat": "chat",
    "/v1/completions": "text_completion",
    "/api/generate": "text_completion",
    "/generate": "text_completion",
    "/v1/embeddings": "embeddings",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
}
# Fields of GenerationConfig by the end of their attribute, gen_ai.request.*.
ASKED = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "choice.count": "num_return_sequences",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Writes a span for each request, as a child of the caller's, which the header `traceparent` names.

    close: sends what is left, at the end of the server; does nothing if the provider is the program's own.
    """

    def __init__(self, provider: TracerProvider, close: Callable[[], None] = lambda: None) -> None:
        self.close = close
        self._tracer = provider.get_tracer("mnemos", __version__, schema_url=SCHEMA)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[None]:
        """The span of a request; its connection is in the scope once the guard has begun."""
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span("request", context=_propagator.extract(carrier), kind=SpanKind.SERVER)
        try:
            with use_span(span, end_on_exit=False):
                yield
        finally:
            if "mnemos" in scope:
                _describe(span, scope, scope["mnemos"])
            span.end()


def exporting_to(endpoint: str) -> Tracing:
    """Traces that are sent in the background by OTLP over HTTP, such as to http://localhost:4318."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as Provider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "mnemos"}
    provider = Provider(resource=Resource.create({**named, "service.version": __version__}))
    whole = endpoint if "/v1/" in endpoint else endpoint.rstrip("/") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=whole)))
    return Tracing(provider, provider.shutdown)


def _describe(span: Span, scope: Scope, connection: Connection) -> None:
    route = getattr(scope.get("route"), "path", None)
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "http.response.status_code": connection.status,
        "http.route": route,
        "mnemos.request_id": connection.id,
    }
    operation, model = OPERATIONS.get(route or ""), connection.notes.get("model")
    span.update_name(f"{operation} {model}" if operation and model else f"{method} {route or 'other'}")
    if operation:
        prompt, completion = connection.tokens()
        attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "mnemos",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.usage.input_tokens": prompt or None,
            "gen_ai.usage.output_tokens": completion or None,
        }
        attributes |= _generation([work for work in connection.works if isinstance(work, Running)])
    if connection.status is None:
        attributes["error.type"] = "client_left" if connection.gone else "no_response"
    elif connection.status >= 400:
        attributes["error.type"] = str(connection.status)
    if connection.status is None or connection.status >= 500:
        span.set_status(StatusCode.ERROR)
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})


def _generation(running: Sequence[Running]) -> dict[str, Any]:
    """What was asked of the first task, and how all of them went. Latencies have vLLM's names, in seconds."""
    if not running:
        return {}
    config, timings = running[0].config, [one.handle.timings for one in running]
    asked = {f"gen_ai.request.{name}": getattr(config, own) for name, own in ASKED.items()}
    stop = [config.stop] if isinstance(config.stop, str) else list(config.stop)
    latencies = {
        "gen_ai.latency.time_in_queue": min(one.queued for one in timings),
        "gen_ai.latency.time_to_first_token": min(one.time_to_first_token for one in timings),
        "gen_ai.latency.e2e": max(one.total for one in timings),
    }
    return {
        **{name: value for name, value in asked.items() if isinstance(value, (int, float))},
        "gen_ai.request.stop_sequences": stop or None,
        "gen_ai.response.finish_reasons": [reason for one in running for reason in one.finishes] or None,
        "gen_ai.usage.cache_read.input_tokens": sum(one.usage.cached_tokens for one in running),
        **{name: seconds for name, seconds in latencies.items() if isfinite(seconds)},
    }
