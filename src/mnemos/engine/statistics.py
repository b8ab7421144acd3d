"""A snapshot of an engine's statistics. A process that does not ask for one starts without this module."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Median and 99th percentile of the latest measurements, in seconds; nan without any."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: deque[float]) -> Latency:
        ordered = sorted(seconds.copy())
        if not ordered:
            return cls(float("nan"), float("nan"))
        return cls(ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])


@dataclass(frozen=True)
class Statistics:
    """A snapshot. Counts start when the engine is created; latencies cover the latest `counters.RECENT` of them."""

    waiting: int
    running: int
    pages_total: int
    pages_used: int
    pages_cached: int  # held only by the prefix cache
    submitted: int
    refused: int
    finished: int
    cancelled: int
    failed: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    evaluated_tokens: int
    steps: int
    busy_seconds: float
    model_seconds: float
    prefix_evictions: int
    time_to_first_token: Latency
    inter_token_latency: Latency
    drafted_tokens: int
    accepted_tokens: int
    prefix_pages: int = 0  # held by the prefix cache, including those in use; of the layers that see farthest back
    prefix_bytes: int = 0  # their memory and that of other layers' pages
    states_total: int = 0  # slots of a model that keeps state beside pages or instead of them
    states_used: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second in which the engine had work."""
        return self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that were found in the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def overhead(self) -> float:
        """The share of the engine's busy time that was not spent in the model."""
        return 1 - self.model_seconds / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of speculative drafts' tokens that the model agreed with."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0
