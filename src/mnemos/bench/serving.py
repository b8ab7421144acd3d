"""Many requests with random arrivals, as in production: throughput and the latencies that users see."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mnemos.bench.results import Result
from mnemos.bench.scheduling import SchedulingBench
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.request import Timings
from mnemos.errors import ConfigError
from mnemos.rules import COUNT


@dataclass(frozen=True)
class Workload:
    """Poisson arrivals at `rate` per second; prompt and output lengths are log-uniform within their ranges, in tokens.

    The same seed gives the same arrivals, lengths and prompts.
    """

    requests: int = 64
    rate: float = 4.0
    seed: int = 0
    prompts: tuple[int, int] = (16, 1024)
    outputs: tuple[int, int] = (16, 128)

    def __post_init__(self) -> None:
        COUNT.apply("requests", self.requests)
        if not 0 < self.rate < float("inf"):
            raise ConfigError(f"rate is {self.rate}; it must be a number of arrivals per second above 0")

    @property
    def length(self) -> int:
        """The most positions that a request may need."""
        return self.prompts[1] + self.outputs[1]


@dataclass(frozen=True)
class Arrival:
    """One request: its arrival in seconds after the start, its prompt, and the number of tokens to generate."""

    at: float
    prompt: list[int]
    tokens: int


def plan(workload: Workload, vocabulary_size: int) -> list[Arrival]:
    """The requests of a workload, in order of arrival."""
    generator = random.Random(workload.seed)
    arrivals, at = [], 0.0
    for _ in range(workload.requests):
        at += generator.expovariate(workload.rate)
        length = _log_uniform(generator, workload.prompts)
        prompt = [generator.randrange(vocabulary_size) for _ in range(length)]
        arrivals.append(Arrival(at, prompt, _log_uniform(generator, workload.outputs)))
    return arrivals


def _log_uniform(generator: random.Random, bounds: tuple[int, int]) -> int:
    low, high = map(math.log, bounds)
    return round(math.exp(generator.uniform(low, high)))


def run_workload(path: Path, backend: str, workload: Workload) -> Iterator[Result]:
    """Runs a workload on a fresh engine and yields its figures, then those of scheduling and strategies."""
    with InferenceEngine.from_pretrained(path, backend=backend, prefix_cache=False) as engine:
        if workload.length > engine.spec.context_length:
            raise ConfigError(
                f"{path}: the context is {engine.spec.context_length} tokens; the requests need up to {workload.length}"
            )
        engine.complete([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        timings = serve(engine, plan(workload, engine.spec.vocabulary_size))
        yield from summarize(timings)
        yield Result("overhead", 100 * engine.stats().overhead, "% of busy time")
        yield from SchedulingBench(engine, workload.seed).results()


def serve(engine: InferenceEngine, arrivals: list[Arrival]) -> list[Timings]:
    """Submits each request at its arrival time and waits for all."""
    start = time.perf_counter()
    handles = []
    for arrival in arrivals:
        time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        handles.append(engine.submit(arrival.prompt, max_new_tokens=arrival.tokens, ignore_eos=True))
    return [handle.result().timings for handle in handles]


def summarize(timings: list[Timings]) -> list[Result]:
    """Throughput over the whole run, and percentiles of time to first token and inter-token latency."""
    seconds = max(one.finished for one in timings) - min(one.submitted for one in timings)
    first = sorted(1000 * one.time_to_first_token for one in timings)
    between = sorted(1000 * gap for one in timings for gap in one.inter_token_latencies)
    results = [
        Result("requests", len(timings) / seconds, "requests/s"),
        Result("output", sum(len(one.tokens) for one in timings) / seconds, "tokens/s"),
    ]
    for name, values in (("ttft", first), ("itl", between)):
        results += [Result(f"{name}_p{p}", percentile(values, p), "ms") for p in (50, 90, 99) if values]
    return results


def percentile(ordered: list[float], p: int) -> float:
    """The smallest of the `ordered` values that at least `p` per cent of them do not exceed."""
    return ordered[max(0, -(-len(ordered) * p // 100) - 1)]
