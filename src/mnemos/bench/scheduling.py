"""The cost of the scheduler and the strategies, each measured against a baseline in interleaved runs."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

from mnemos.bench.results import Result
from mnemos.bench.steps import Stepper
from mnemos.contract import PagedModel
from mnemos.engine.engine import InferenceEngine

RUNS = 3
STREAMS = 32
STEPS = 64
LONG_PROMPT = 4000  # tokens
DISTURBED = 384  # tokens of each stream during which a long prompt arrives
LOOP = 24  # period, in tokens, of a text that repeats itself


class SchedulingBench:
    """Measures on an idle engine without a prefix cache, since its pages are also used for steps without the engine."""

    def __init__(self, engine: InferenceEngine, seed: int = 0) -> None:
        self.engine = engine
        self.random = random.Random(seed)

    def results(self) -> Iterator[Result]:
        yield self._concurrency()
        yield Result("stall", self._stall(), "x median")
        yield Result("beams4", self._ratio(self._beams, self._four), "x 4 greedy")
        yield Result("lookup_loop", self._ratio(*self._lookup(repetitive=True)), "x plain")
        yield Result("lookup_other", self._ratio(*self._lookup(repetitive=False)), "x plain")
        for streams in (1, STREAMS):
            yield Result(f"overhead{streams}", 100 * self._overhead(streams), "% of a step")

    def _ratio(self, one: Callable[[], float], other: Callable[[], float]) -> float:
        """The median ratio of two rates measured in turns; nan if one of them is."""
        ratios = [one() / other() for _ in range(RUNS)]
        return math.nan if any(map(math.isnan, ratios)) else statistics.median(ratios)

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        size = self.engine.spec.vocabulary_size
        return [[self.random.randrange(size) for _ in range(length)] for _ in range(count)]

    def _concurrency(self) -> Result:
        """The rate of steps driven by requests relative to pure steps: both over STEPS steps at equal lengths."""
        ratio = self._ratio(self._concurrent, self._pure_steps)
        unit = f"{STREAMS} requests never decoded all at once" if math.isnan(ratio) else "x b32"
        return Result(f"concurrent{STREAMS}", ratio, unit)

    def _concurrent(self) -> float:
        """Tokens/s of STREAMS requests over the STEPS steps from the last request's first decoding step on.

        nan if one of them ends before that: then they never all decoded at once.
        """
        most = min(self.engine.spec.context_length - 64, 16 * STEPS)
        handles = [self.engine.submit(prompt, **_length(most)) for prompt in self._prompts(STREAMS, 64)]
        times = [handle.timings.tokens for handle in handles]
        while min(map(len, times)) <= STEPS and not any(handle.done for handle in handles):
            time.sleep(0.02)
        for handle in handles:
            handle.cancel()
        for handle in handles:
            handle.result()
        latest = max(times, key=lambda own: own[0] if own else math.inf)
        if len(latest) <= STEPS or min(own[-1] for own in times) < latest[STEPS]:
            return math.nan
        return STREAMS * STEPS / (latest[STEPS] - latest[0])

    def _pure_steps(self) -> float:
        """The same with model steps alone."""
        stepper = Stepper(cast(PagedModel, self.engine.model), STREAMS, 64 + STEPS + 1)
        chosen = stepper.prompt(self._prompts(STREAMS, 64))
        start = time.perf_counter()
        stepper.decode(chosen, STEPS)
        return STREAMS * STEPS / (time.perf_counter() - start)

    def _stall(self) -> float:
        """99th percentile of inter-token latency over its median, for 8 streams during which a long prompt arrives."""
        length = min(LONG_PROMPT, self.engine.spec.context_length - 8)
        handles = [
            self.engine.submit(prompt, max_new_tokens=DISTURBED, ignore_eos=True) for prompt in self._prompts(8, 32)
        ]
        time.sleep(0.5)
        self.engine.complete(self._prompts(1, length)[0], max_new_tokens=2, ignore_eos=True)
        times = [handle.result().timings.tokens for handle in handles]
        gaps = sorted(later - earlier for own in times for earlier, later in pairwise(own))
        return gaps[len(gaps) * 99 // 100] / statistics.median(gaps)

    def _beams(self) -> float:
        prompt = self._prompts(1, 16)[0]
        return self._rate(4 * STEPS, lambda: self.engine.complete(prompt, num_beams=4, **_length(STEPS)))

    def _four(self) -> float:
        prompts = self._prompts(4, 16)
        return self._rate(4 * STEPS, lambda: self.engine.complete(prompts, **_length(STEPS)))

    def _lookup(self, repetitive: bool) -> tuple[Callable[[], float], Callable[[], float]]:
        """Rates with and without prompt lookup, for a text that repeats itself or one that is sampled."""
        prompt = self._prompts(1, LOOP)[0] * (6 if repetitive else 1)
        settings: dict[str, Any] = {} if repetitive else {"temperature": 1.5, "seed": 1}

        def rate(speculative: str | None) -> float:
            times: list[float] = self.engine.complete(
                prompt, speculative=speculative, **_length(128), **settings
            ).timings.tokens
            return 127 / (times[-1] - times[0])

        return lambda: rate("prompt_lookup"), lambda: rate(None)

    def _overhead(self, streams: int) -> float:
        """The share of the steps' time that is not spent in the model while `streams` requests decode."""
        before = self.engine.stats()
        self.engine.complete(self._prompts(streams, 16), **_length(2 * STEPS))
        after = self.engine.stats()
        return 1 - (after.model_seconds - before.model_seconds) / (after.busy_seconds - before.busy_seconds)

    @staticmethod
    def _rate(tokens: int, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return tokens / (time.perf_counter() - start)


def _length(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "ignore_eos": True}
