"""How each metric is measured: processes first, then steps of the model alone, then sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

from mnemos.bench.metrics import Metric
from mnemos.bench.results import Result
from mnemos.errors import ConfigError, MnemosError
from mnemos.machine.figures import Limits


@dataclass(frozen=True)
class Subject:
    """The subject of a measurement: a model's path, how it is run, and the machine's limits."""

    path: Path
    backend: str
    limits: Limits


def measure(
    metrics: Sequence[Metric], subject: Subject, announce: Callable[[str], None], *, all_of_them: bool = True
) -> Iterator[Result]:
    """Yields each figure as soon as it is measured; processes are measured before the model is loaded here.

    A metric that the model does not support is an error: before anything is measured if it needs a longer context, else
    when its turn comes; without `all_of_them`, it yields a Result of nan with the reason.
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
    """The metrics that need more positions than the model has; transformers models report that themselves."""
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
