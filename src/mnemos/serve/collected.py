"""Metrics of the server and of each loaded model's engine, in Prometheus' form.

Counts and gauges are read from the engines when somebody asks; only distributions are collected meanwhile. Labels are
the names of models on offer, routes and fixed words, never what a client sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mnemos.engine.counters import Event
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.statistics import Statistics
from mnemos.serve.catalogue import Catalogue

# Name, help and value of each gauge of an engine.
GAUGES: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("mnemos_requests_running", "Requests in the batch", lambda now: now.running),
    ("mnemos_requests_waiting", "Requests in the queue", lambda now: now.waiting),
    ("mnemos_cache_pages", "Pages of the key/value cache", lambda now: now.pages_total),
    ("mnemos_cache_pages_used", "Pages in use by requests", lambda now: now.pages_used - now.pages_cached),
    ("mnemos_cache_pages_cached", "Pages that only the prefix cache holds", lambda now: now.pages_cached),
    # The names that gateways look for: llm-d and the inference extension of the Gateway API.
    ("vllm:num_requests_running", "Requests in the batch, under vLLM's name", lambda now: now.running),
    ("vllm:num_requests_waiting", "Requests in the queue, under vLLM's name", lambda now: now.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the cache that requests use, from 0 to 1, under vLLM's name",
        lambda now: (now.pages_used - now.pages_cached) / max(now.pages_total, 1),
    ),
)
COUNTERS: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("mnemos_requests_submitted", "Requests that were queued", lambda now: now.submitted),
    ("mnemos_requests_refused", "Requests that the full queue refused", lambda now: now.refused),
    ("mnemos_requests_finished", "Requests that ended by themselves", lambda now: now.finished),
    ("mnemos_requests_cancelled", "Requests whose client left", lambda now: now.cancelled),
    ("mnemos_requests_failed", "Requests that ended with an error", lambda now: now.failed),
    ("mnemos_preemptions", "Requests that gave their pages to others and were recomputed", lambda now: now.preemptions),
    ("mnemos_prompt_tokens", "Tokens of prompts", lambda now: now.prompt_tokens),
    ("mnemos_cached_tokens", "Tokens of prompts that were found in the prefix cache", lambda now: now.cached_tokens),
    ("mnemos_generated_tokens", "Generated tokens", lambda now: now.generated_tokens),
    ("mnemos_drafted_tokens", "Tokens that were guessed by speculation", lambda now: now.drafted_tokens),
    ("mnemos_accepted_tokens", "Guessed tokens that were right", lambda now: now.accepted_tokens),
    ("mnemos_engine_steps", "Steps of the engine", lambda now: now.steps),
    ("mnemos_engine_busy_seconds", "Time that the engine spent in steps", lambda now: now.busy_seconds),
)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1)


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.responses: Counter[tuple[str, str, str]] = Counter()  # by method, route and status
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(self))
        self._first_token = self._histogram(
            "mnemos_time_to_first_token_seconds", "From queue to first token", _FIRST_TOKEN
        )
        self._between = self._histogram(
            "mnemos_inter_token_latency_seconds", "Mean time between a request's tokens", _BETWEEN
        )
        self._whole = self._histogram("mnemos_request_seconds", "From queue to the end of a request", _FIRST_TOKEN)

    def watch(self, name: str, engine: InferenceEngine) -> Callable[[], None]:
        """Collects the distributions of an engine's requests; returns a function that ends this."""
        first: dict[int, float] = {}

        def on_event(event: Event) -> None:
            if event.kind == "first_token":
                first[event.request] = event.seconds
                self._first_token.labels(name).observe(event.seconds)
            elif event.kind in ("finished", "cancelled", "failed"):
                began = first.pop(event.request, None)
                if event.kind == "finished":
                    self._whole.labels(name).observe(event.seconds)
                    if began is not None and event.tokens > 1:
                        self._between.labels(name).observe((event.seconds - began) / (event.tokens - 1))

        return engine.subscribe(on_event)

    def page(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, ["model_name"], registry=self.registry, buckets=buckets)


class _Engines(Collector):
    """Reads the engines' own counts when a scrape comes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        models = self._metrics.catalogue.models
        now = {model.name: model.engine.stats() for model in models if model.loaded}
        for kind, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, help_text, value in rows:
                family = kind(name, help_text, labels=["model_name"])
                for model_name, statistics in now.items():
                    family.add_metric([model_name], value(statistics))
                yield family
        ends = CounterMetricFamily(
            "mnemos_results", "Finished results by their reason", labels=["model_name", "reason"]
        )
        for model in models:
            for reason, count in model.ends.items():
                ends.add_metric([model.name, reason], count)
        yield ends
        responses = CounterMetricFamily("mnemos_http_responses", "Responses", labels=["method", "route", "status"])
        for labels, count in list(self._metrics.responses.items()):
            responses.add_metric(list(labels), count)
        yield responses
