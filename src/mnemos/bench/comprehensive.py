"""What a user notices of a model, in one run: latency, throughput, memory, the processor's use and the cache's work."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.bench.results import Result
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.request import Timings
from mnemos.errors import ConfigError
from mnemos.machine.figures import usable_cores
from mnemos.machine.memory import resident_memory

_SAMPLING = 0.01  # seconds between two looks at the process's memory


@dataclass(frozen=True)
class Suite:
    """What is run. prompts: their lengths; tokens: generated for a response; streams: at once; repeats: of latencies.

    Prompts that do not fit in the model's context are left out.
    """

    prompts: tuple[int, ...] = (16, 128, 512)
    tokens: int = 64
    streams: int = 8
    repeats: int = 5


@dataclass(frozen=True)
class Figure:
    """A figure of a group. target: what MLoT-Spark asks for, in the result's unit; None without one."""

    group: str
    result: Result
    target: float | None = None
    higher_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        value = self.result.value
        return value >= self.target if self.higher_is_better else value <= self.target

    @property
    def verdict(self) -> str:
        """The target and whether it is met, in words; "" without one."""
        if self.target is None:
            return ""
        relation = "at least" if self.higher_is_better else "at most"
        return f"target: {relation} {self.target:g}, {'met' if self.met else 'missed'}"

    def to_json(self) -> str:
        """The result's JSON object, with group, target and whether that is met."""
        more = {"group": self.group, "target": self.target, "met": self.met}
        return json.dumps({**json.loads(self.result.to_json()), **more})


DEFAULT_SUITE = Suite()


def measure_comprehensive(source: str | Path, backend: str = "auto", suite: Suite | None = None) -> Iterator[Figure]:
    """The figures of a model, one after the other; ConfigError if its context is too short for any prompt."""
    suite = DEFAULT_SUITE if suite is None else suite
    before = resident_memory()
    with InferenceEngine.from_pretrained(source, backend=backend) as engine:
        yield from _Run(engine, suite, before).figures()


class _Run:
    def __init__(self, engine: InferenceEngine, suite: Suite, before: int) -> None:
        self.engine = engine
        self.suite = suite
        self.before = before
        self.peak = 0
        context = engine.spec.context_length
        self.lengths = [length for length in suite.prompts if length + suite.tokens <= context]
        if not self.lengths:
            raise ConfigError(
                f"the context is {context} tokens; the suite needs {min(suite.prompts) + suite.tokens} or more"
            )
        self.random = random.Random(0)

    def figures(self) -> Iterator[Figure]:
        self._respond(self._prompt(self.lengths[0]))  # what is done once, at the first request
        with self._watched():
            yield from self._latencies()
            yield from self._rates()
            yield from self._cache()
        loaded, peak = (1e-6 * bytes for bytes in (self.loaded - self.before, self.peak))
        yield Figure("memory", Result("loaded", loaded, "MB"))
        yield Figure("memory", Result("peak_rss", peak, "MB"), target=6e3)

    def _latencies(self) -> Iterator[Figure]:
        """Each prompt is a new one, of which nothing is cached."""
        responses: list[float] = []
        for length in self.lengths:
            timings = [self._respond(self._prompt(length)) for _ in range(self.suite.repeats)]
            first = statistics.median(one.time_to_first_token for one in timings)
            responses.append(statistics.median(one.finished - one.submitted for one in timings))
            yield Figure("latency", Result(f"first_token_{length}", 1e3 * first, "ms"))
        for length, seconds in zip(self.lengths, responses, strict=True):
            name = f"response_{length}+{self.suite.tokens}"
            yield Figure("latency", Result(name, 1e3 * seconds, "ms"), target=1e3)

    def _rates(self) -> Iterator[Figure]:
        """Tokens per second of one stream and of several, and the share of the usable cores' time that they take."""
        usage = []
        for streams in (1, self.suite.streams):
            prompts = [self._prompt(self.lengths[0]) for _ in range(streams)]
            tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
            handles = [self.engine.submit(prompt, **self._length) for prompt in prompts]
            for handle in handles:
                tokens += len(handle.result().timings.tokens)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            result = Result(f"streams_{streams}", tokens / wall, "tokens/s")
            yield Figure("throughput", result, target=50.0, higher_is_better=True)
            usage.append((streams, 100 * cpu / (wall * usable_cores())))
        for streams, percent in usage:
            yield Figure("cpu", Result(f"cpu_{streams}", percent, "% of cores"))

    def _cache(self) -> Iterator[Figure]:
        """Questions about one long text: the share of their tokens that was found, and what that saves."""
        text = self._prompt(self.lengths[-1])
        cold = self._respond(text).time_to_first_token
        before = self.engine.stats()
        warm = [self._respond([*text[:-4], *self._prompt(4)]).time_to_first_token for _ in range(self.suite.repeats)]
        after = self.engine.stats()
        found, asked = after.cached_tokens - before.cached_tokens, after.prompt_tokens - before.prompt_tokens
        yield Figure("cache", Result("hit_rate", 100 * found / asked, "% of tokens"), higher_is_better=True)
        faster = cold / statistics.median(warm)
        yield Figure("cache", Result("first_token_faster", faster, "x"), higher_is_better=True)
        yield Figure("memory", Result("cached_pages", 1e-6 * after.prefix_bytes, "MB"))

    def _respond(self, prompt: list[int]) -> Timings:
        timings: Timings = self.engine.submit(prompt, **self._length).result().timings
        return timings

    @property
    def _length(self) -> dict[str, Any]:
        return {"max_new_tokens": self.suite.tokens, "ignore_eos": True}

    def _prompt(self, length: int) -> list[int]:
        return [self.random.randrange(self.engine.spec.vocabulary_size) for _ in range(length)]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes how much memory the process takes at the beginning and at most."""
        self.loaded = self.peak = resident_memory()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SAMPLING):
                self.peak = max(self.peak, resident_memory())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
