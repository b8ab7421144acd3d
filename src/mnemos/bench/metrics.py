"""The metrics by name: which there are, and how each is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mnemos.bench.machine import Limits
from mnemos.bench.results import Result
from mnemos.errors import ConfigError

DEFAULT_METRICS = ("cold", "rss", "pp128", "pp512", "pp1024", "tg128", "tg128@d1024", "b8", "b32", "sampling")
_NAME = re.compile(r"(?P<kind>pp|tg|b)(?P<count>[1-9]\d{0,5})(?:@d(?P<depth>[1-9]\d{0,5}))?")
_PROMPT_OF_TG = 16


@dataclass(frozen=True)
class Metric:
    """kind: pp, tg or b with a count of tokens or sequences (and, for tg, of prompt tokens), cold, rss or sampling."""

    name: str
    kind: str
    count: int = 0
    depth: int = 0

    @property
    def length(self) -> int:
        """Positions that one sequence needs."""
        return {"pp": self.count + 1, "tg": self.depth + self.count + 2, "b": 130}.get(self.kind, 0)


def parse_metrics(names: Sequence[str]) -> list[Metric]:
    """ConfigError for a name that is none."""
    return [_parse(name) for name in names]


def _parse(name: str) -> Metric:
    if name in ("cold", "rss", "sampling"):
        return Metric(name, name)
    match = _NAME.fullmatch(name)
    if match is None or (match["depth"] and match["kind"] != "tg"):
        raise ConfigError(f"metric {name!r} is none of ppN, tgN, tgN@dN, bN, cold, rss, sampling (N: a number)")
    kind, count = match["kind"], int(match["count"])
    if kind != "tg":
        return Metric(name, kind, count)
    # tg128@d1024 ends at a depth of 1,024 tokens, the last of which is only chosen.
    depth = int(match["depth"]) - count - 1 if match["depth"] else _PROMPT_OF_TG
    if depth < 1:
        raise ConfigError(f"metric {name!r} needs a depth above {count + 1}")
    return Metric(name, kind, count, depth)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model's path, how it is run, and what the machine allows."""

    path: Path
    backend: str
    limits: Limits


def measure(metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None]) -> Iterator[Result]:
    """Yields each figure as it is there; processes are measured before the model is loaded here."""
    costs = [metric for metric in metrics if metric.kind in ("cold", "rss")]
    steps = [metric for metric in metrics if metric.kind in ("pp", "tg", "b")]
    if costs:
        announce("cold start and memory")
        yield from _measure_processes(costs, subject)
    if steps:
        yield from _measure_steps(steps, subject, announce)
    if any(metric.kind == "sampling" for metric in metrics):
        announce("sampling")
        from mnemos.bench.sampling import compare_sampling

        yield from compare_sampling(subject.path, subject.backend)


def _measure_processes(metrics: Sequence[Metric], subject: Subject) -> Iterator[Result]:
    from mnemos.bench.process import measure_start

    cost = measure_start(str(subject.path), subject.backend)
    for metric in metrics:
        if metric.kind == "cold":
            yield Result("cold", cost.seconds, "s")
        else:
            yield Result("rss", cost.peak_bytes / (1 << 20), "MB")


def _measure_steps(metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None]) -> Iterator[Result]:
    from mnemos.bench.steps import StepBench
    from mnemos.bench.work import count_work, rate_limit
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.models.load import load_model

    model = load_model(open_checkpoint(subject.path), backend=subject.backend)
    for metric in metrics:
        if metric.length > model.spec.context_length:
            raise ConfigError(
                f"metric {metric.name} needs {metric.length} positions, the model has {model.spec.context_length}"
            )
    most_sequences = max((metric.count for metric in metrics if metric.kind == "b"), default=1)
    announce("loading")
    bench = StepBench(model, most_sequences, max(metric.length for metric in metrics))
    work = count_work(model)
    for metric in metrics:
        announce(metric.name)
        if metric.kind == "pp":
            value = bench.prompt_rate(metric.count)
        elif metric.kind == "tg":
            value = bench.decode_rate(metric.depth, metric.count)
        else:
            value = bench.batch_rate(metric.count)
        limit, bound = rate_limit(metric, work, model.spec.layout, subject.limits) if work else (None, "")
        yield Result(metric.name, value, "tokens/s", limit, bound)
