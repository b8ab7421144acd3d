"""The metrics by name: which there are, and how each is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

from mnemos.bench.results import Result
from mnemos.errors import ConfigError, MnemosError
from mnemos.machine.figures import Limits

DEFAULT_METRICS = ("cold", "rss", "pp128", "pp512", "pp1024", "tg128", "tg128@d1024", "b8", "b32", "sampling")
_KINDS = "ppN, tgN, tgN@dN, bN, cold, rss, sampling (N: a number)"
_NAME = re.compile(r"(?P<kind>pp|tg|b)(?P<count>[1-9]\d{0,5})(?:@d(?P<depth>[1-9]\d{0,5}))?")
_PROMPT_OF_TG = 16
_LENGTH_OF_SAMPLING = 145  # a prompt of 16 tokens and 129 new ones


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
        lengths = {"pp": self.count + 1, "tg": self.depth + self.count + 2, "b": 130, "sampling": _LENGTH_OF_SAMPLING}
        return lengths.get(self.kind, 0)


def parse_metrics(names: Sequence[str]) -> list[Metric]:
    """ConfigError for a name that is none, and where there are no names."""
    if not names:
        raise ConfigError(f"no metric is named; give some of {_KINDS}")
    return [_parse(name) for name in names]


def _parse(name: str) -> Metric:
    if name in ("cold", "rss", "sampling"):
        return Metric(name, name)
    match = _NAME.fullmatch(name)
    if match is None or (match["depth"] and match["kind"] != "tg"):
        raise ConfigError(f"metric {name!r} is none of {_KINDS}")
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


def measure(
    metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None], *, all_of_them: bool = True
) -> Iterator[Result]:
    """Yields each figure as it is there; processes are measured before the model is loaded here.

    A metric that cannot be had of this model is an error before anything is measured if it wants a longer context, else
    when its turn comes; without `all_of_them` it yields a Result of nan that says why.
    """
    costs = [metric for metric in metrics if metric.kind in ("cold", "rss")]
    steps = [metric for metric in metrics if metric.kind in ("pp", "tg", "b")]
    others = [metric for metric in metrics if metric.kind == "sampling"]
    groups = ((costs, _measure_processes), (steps, _measure_steps), (others, _measure_sampling))
    lacking = _find_lacking([*steps, *others], subject) if steps or others else {}
    if lacking and all_of_them:
        raise next(iter(lacking.values()))
    for wanted, run in groups:
        group = [metric for metric in wanted if metric not in lacking]
        try:
            if group:
                yield from run(group, subject, announce)
        except MnemosError as error:
            if all_of_them:
                raise
            yield from (Result(metric.name, nan, str(error)) for metric in group)
        yield from (Result(metric.name, nan, str(lacking[metric])) for metric in wanted if metric in lacking)


def _find_lacking(metrics: Sequence[Metric], subject: Subject) -> dict[Metric, ConfigError]:
    """The metrics that want more positions than the model has; what runs through transformers says so by itself."""
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.models.load import describe_model, is_built_in

    checkpoint = open_checkpoint(subject.path)
    if not is_built_in(checkpoint):
        return {}
    context = describe_model(checkpoint).context_length
    return {
        metric: ConfigError(f"metric {metric.name} needs {metric.length} positions, the model has {context}")
        for metric in metrics
        if metric.length > context
    }


def _measure_processes(
    metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None]
) -> Iterator[Result]:
    from mnemos.bench.process import measure_start

    announce("cold start and memory")
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


def _measure_sampling(metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None]) -> Iterator[Result]:
    from mnemos.bench.sampling import compare_sampling

    for metric in metrics:
        announce(metric.name)
        yield from compare_sampling(subject.path, subject.backend)
