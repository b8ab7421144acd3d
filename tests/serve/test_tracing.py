"""OpenTelemetry traces: a span for each request, with the conventions' attributes and the caller's trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.settings import Settings
from tests.serve.running import events_of, running

PATH = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "A secret question"}], "max_tokens": 6, "temperature": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(engine: InferenceEngine, exporter: InMemorySpanExporter) -> Iterator[httpx.Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with running(app(engine, name="smollm2", tracer_provider=provider)) as client:
        yield client


@pytest.fixture
def spans(exporter: InMemorySpanExporter, traced: httpx.Client) -> Any:
    exporter.clear()

    def finished() -> Any:
        traced.get("/health")  # by then, the span of the request before has ended
        return [span for span in exporter.get_finished_spans() if span.attributes["http.route"] != "/health"]

    return finished


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_says_what_was_asked_and_what_came(traced: httpx.Client, spans: Any, stream: bool) -> None:
    if stream:
        events_of(traced, PATH, {**BODY, "stream": True, "stop": ["zzz"]})
    else:
        answer = traced.post(PATH, json={**BODY, "stop": ["zzz"]}, headers={"x-request-id": "mine"})
        assert answer.status_code == 200
    (span,) = spans()
    found = dict(span.attributes)
    assert span.name == "chat smollm2" and span.kind is SpanKind.SERVER and span.status.status_code is StatusCode.UNSET
    expected = {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mnemos",
        "gen_ai.request.model": "smollm2",
        "gen_ai.response.model": "smollm2",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stop_sequences": ("zzz",),
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 6,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["gen_ai.usage.input_tokens"] > 6
    assert 0 < found["gen_ai.latency.time_to_first_token"] <= found["gen_ai.latency.e2e"]
    assert stream or found["mnemos.request_id"] == "mine"
    assert "secret" not in str(found)


def test_the_callers_trace_is_continued(traced: httpx.Client, spans: Any) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    traced.post(PATH, json=BODY, headers={"traceparent": f"00-{trace}-{parent}-01", "tracestate": "a=b"})
    (span,) = spans()
    assert f"{span.context.trace_id:032x}" == trace and f"{span.parent.span_id:016x}" == parent
    traced.post(PATH, json=BODY, headers={"traceparent": "nonsense"})
    assert spans()[-1].parent is None


def test_refusals_are_errors_of_the_client(traced: httpx.Client, spans: Any) -> None:
    traced.post(PATH, json={"messages": []})
    (span,) = spans()
    assert span.attributes["error.type"] == "400" and span.status.status_code is StatusCode.UNSET
    assert "gen_ai.request.temperature" not in span.attributes


def test_several_prompts_and_embeddings(traced: httpx.Client, spans: Any) -> None:
    traced.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2})
    traced.post("/v1/embeddings", json={"input": "a"})
    completion, embedding = spans()
    assert completion.name == "text_completion smollm2"
    assert completion.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert completion.attributes["gen_ai.usage.output_tokens"] == 4
    assert embedding.attributes["gen_ai.operation.name"] == "embeddings"
    assert embedding.attributes["gen_ai.usage.input_tokens"] >= 1


def test_spans_are_sent_by_otlp_before_the_server_ends(engine: InferenceEngine) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        settings = Settings(otlp_traces_endpoint=f"http://127.0.0.1:{collector.server_port}")
        with running(app(engine, name="smollm2", settings=settings)) as client:
            client.get("/v1/models")
        collector.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces" and b"/v1/models" in body and b"mnemos" in body
