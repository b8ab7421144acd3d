"""The serving comparison: figures of known times, engines that fail, and the table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mnemos.bench.serving import Arrival, Workload

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_peers.py"
ARRIVALS = [Arrival(0.5, [1, 2], 3), Arrival(1.0, [3], 2)]
TIMES = [[1.0, 1.2, 2.0], [1.25, 3.0]]


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_figures_of_known_times(serve: ModuleType) -> None:
    figures = serve.figures(ARRIVALS, TIMES)
    assert figures == pytest.approx(
        {
            "requests/s": 2 / 2.5,
            "output": 5 / 2.5,
            "ttft p50": 250,
            "ttft p99": 500,
            "itl p50": 800,
            "itl p99": 1750,
        }
    )


def test_an_engine_that_stops_early_is_no_result(serve: ModuleType) -> None:
    with pytest.raises(SystemExit, match="asked for 2 tokens and got 1"):
        serve.figures(ARRIVALS, [TIMES[0], [1.25]])


def test_every_engine_gets_the_same_work_and_failures_are_named(serve: ModuleType) -> None:
    echo = "import sys, json; work = json.load(sys.stdin); print('RESULT', [[at + 1] * n for at, _, n in work])"
    commands = {"good": python(echo), "bad": python("raise SystemExit('no such model')"), "none": ["/nowhere/python"]}
    results = serve.measure(commands, ARRIVALS, rounds=2)
    assert results["good"]["ttft p50"] == pytest.approx(1000)
    assert results["bad"] == "no such model"
    assert "/nowhere/python" in results["none"]
    table = serve.table(results, Workload())
    assert "| | good |" in table and "| ttft p50, ms | 1,000 |" in table
    assert "Not measured: bad (no such model)." in table and "Not measured: none (" in table
