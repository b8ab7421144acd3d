"""The workload is the same for the same seed, and its figures are right."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from mnemos.bench import scheduling
from mnemos.bench.scheduling import SchedulingBench
from mnemos.bench.serving import Workload, percentile, plan, run_workload, summarize
from mnemos.cli.bench import _row
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.request import Timings
from mnemos.errors import ConfigError
from tests.engine.toys import ToyModel


def test_a_seed_fixes_the_workload() -> None:
    assert plan(Workload(seed=3), 1000) == plan(Workload(seed=3), 1000)
    assert plan(Workload(seed=3), 1000) != plan(Workload(seed=4), 1000)


def test_arrivals_come_at_the_rate_and_lengths_within_their_ranges() -> None:
    arrivals = plan(Workload(requests=2000, rate=10.0), 500)
    assert all(earlier.at < later.at for earlier, later in pairwise(arrivals))
    assert arrivals[-1].at == pytest.approx(200, rel=0.1)
    lengths = [len(arrival.prompt) for arrival in arrivals]
    assert min(lengths) >= 16 and max(lengths) <= 1024
    assert sorted(lengths)[1000] == pytest.approx(128, rel=0.15)  # the median of a log-uniform length
    assert all(16 <= arrival.tokens <= 128 for arrival in arrivals)
    assert all(0 <= token < 500 for arrival in arrivals for token in arrival.prompt)


def test_figures_of_known_timings() -> None:
    timings = [
        Timings(submitted=0.0, started=0.0, finished=2.0, tokens=[0.5, 1.0, 2.0]),
        Timings(submitted=1.0, started=1.0, finished=4.0, tokens=[2.0, 4.0]),
    ]
    figures = {result.metric: result.value for result in summarize(timings)}
    assert figures["requests"] == pytest.approx(0.5)
    assert figures["output"] == pytest.approx(1.25)
    assert figures["ttft_p50"] == pytest.approx(500) and figures["ttft_p99"] == pytest.approx(1000)
    assert figures["itl_p50"] == pytest.approx(1000) and figures["itl_p99"] == pytest.approx(2000)


@pytest.mark.parametrize(("p", "value"), [(50, 50), (90, 90), (99, 99), (100, 100), (1, 1)])
def test_percentiles(p: int, value: float) -> None:
    assert percentile([float(v) for v in range(1, 101)], p) == value


@pytest.mark.parametrize("options", [{"requests": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"rate": float("inf")}])
def test_impossible_workloads_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Workload(**options)  # type: ignore[arg-type]


def test_a_context_shorter_than_the_longest_request_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        InferenceEngine, "from_pretrained", lambda path, **options: InferenceEngine(ToyModel(context_length=512))
    )
    with pytest.raises(ConfigError, match="context is 512 tokens; the requests need up to 1152"):
        next(run_workload(tmp_path, "auto", Workload()))


@pytest.mark.slow
def test_figures_of_scheduling_on_any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "RUNS", 1)
    with InferenceEngine(ToyModel(context_length=512), prefix_cache=False, cache_tokens=16_384) as engine:
        figures = {result.metric: result.value for result in SchedulingBench(engine).results()}
        assert engine.stats().pages_used == 0
    ratios = ["concurrent32", "stall", "beams4", "lookup_loop", "lookup_other"]
    assert list(figures) == [*ratios, "overhead1", "overhead32"]
    assert all(figures[name] > 0 for name in ratios)
    assert 0 < figures["overhead1"] < 100 and 0 < figures["overhead32"] < 100


def test_what_was_not_measured_has_a_reason_instead_of_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "RUNS", 1)
    with InferenceEngine(ToyModel(context_length=512), cache_tokens=16_384, max_sequences=8) as engine:
        first = next(SchedulingBench(engine).results())
    assert first.metric == "concurrent32" and first.unit == "32 requests never decoded all at once"
    assert json.loads(first.to_json())["value"] is None
    assert _row(first) == "concurrent32      not measured: 32 requests never decoded all at once"
