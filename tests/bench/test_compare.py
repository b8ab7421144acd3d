"""The comparison keeps the best of each engine, names missing ones, and writes its table between the marks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mnemos.machine.figures import Limits, Machine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"
MACHINE = Machine("Some CPU", 2, "avx2", Limits(25e9, {"float32": 1e11, "int8": 2e11}))


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


def prints(*figures: tuple[str, str, float]) -> list[str]:
    """A command that prints these figures, whatever metric it is given."""
    lines = [json.dumps({"engine": e, "metric": m, "value": v, "unit": "-"}) for e, m, v in figures]
    return [sys.executable, "-c", "print({!r})".format("\n".join(lines))]


def test_the_best_of_the_rounds_counts(compare: ModuleType) -> None:
    figures = compare.Figures()
    for speed, memory in ((100.0, 300.0), (120.0, 200.0), (90.0, 250.0)):
        figures.add("mnemos", "tg128", speed)
        figures.add("mnemos", "rss", memory)
    assert figures.values == {"mnemos": {"tg128": 120.0, "rss": 200.0}}


def test_an_engine_that_fails_is_named_and_not_asked_again(compare: ModuleType) -> None:
    commands = {
        "mnemos": prints(("mnemos", "tg128", 200.0)),
        "peer": prints(("peer", "tg128", 80.0)),
        "broken": [sys.executable, "-c", "import sys; sys.exit('no such library')"],
        "absent": ["/no/such/python"],
    }
    figures = compare.measure(commands, 2, ["tg128"])
    assert figures.values == {"mnemos": {"tg128": 200.0}, "peer": {"tg128": 80.0}}
    assert figures.missing["broken"] == "no such library"
    assert "No such file" in figures.missing["absent"]
    table = compare.table(figures, ["tg128"], MACHINE, "model.gguf")
    assert "| **200** | 2.50 x peer | 80.0 |" in table
    assert "Not measured: broken (no such library)." in table


def test_the_best_peer_is_the_smallest_where_less_is_better(compare: ModuleType) -> None:
    figures = compare.Figures()
    for engine, seconds in (("mnemos", 0.2), ("slow", 4.0), ("fast", 0.4)):
        figures.add(engine, "cold", seconds)
    assert figures.best_peer("cold") == ("fast", 0.4)
    assert figures.best_peer("rss") is None
    assert "0.50 x fast" in compare.table(figures, ["cold"], MACHINE, "model.gguf")


def test_figures_are_gathered_from_several_runs(compare: ModuleType, tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    compare.measure({"mnemos": prints(("mnemos", "tg128", 200.0)), "broken": ["/no/such/python"]}, 1, ["tg128"], kept)
    commands = {"mnemos": prints(("mnemos", "tg128", 190.0)), "broken": prints(("broken", "tg128", 50.0))}
    figures = compare.measure(commands, 1, ["tg128"], kept)
    assert figures.values == {"mnemos": {"tg128": 200.0}, "broken": {"tg128": 50.0}}
    assert not figures.missing


def test_a_metric_without_a_label_has_its_name(compare: ModuleType) -> None:
    figures = compare.Figures({"mnemos": {"pp64": 500.0}})
    assert "| `pp64` | **500** | - |" in compare.table(figures, ["pp64"], MACHINE, "model.gguf")
