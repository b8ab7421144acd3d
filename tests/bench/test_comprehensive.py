"""The comprehensive suite: its figures, its targets and its picture."""

from __future__ import annotations

import json
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mnemos.bench.comprehensive import Figure, Suite, measure_comprehensive
from mnemos.bench.picture import draw
from mnemos.bench.results import Result
from mnemos.cli.main import main
from mnemos.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "benchmark_inference.py"
SMALL = Suite(prompts=(16, 72), tokens=4, streams=2, repeats=2)


@pytest.fixture(scope="module")
def figures(smollm2: Path) -> list[Figure]:
    return list(measure_comprehensive(smollm2, suite=SMALL))


def test_every_group_has_its_figures(figures: list[Figure]) -> None:
    found = {figure.result.metric: figure for figure in figures}
    assert list(found) == [
        "first_token_16", "first_token_72", "response_16+4", "response_72+4", "streams_1", "streams_2", "cpu_1",
        "cpu_2", "hit_rate", "first_token_faster", "cached_pages", "loaded", "peak_rss",
    ]  # fmt: skip
    assert {figure.group for figure in figures} == {"latency", "throughput", "cpu", "cache", "memory"}
    assert found["response_72+4"].result.value > found["first_token_72"].result.value > 0
    assert found["hit_rate"].result.value == pytest.approx(100 * 64 / 72)  # two pages of 32 of each prompt
    assert 0 < found["cpu_1"].result.value <= 110
    assert found["peak_rss"].result.value > 100
    assert found["peak_rss"].met is True


def test_targets() -> None:
    slow = Figure("latency", Result("response", 1500, "ms"), target=1000)
    fast = Figure("throughput", Result("streams", 60, "tokens/s"), target=50, higher_is_better=True)
    assert (slow.met, fast.met, Figure("cpu", Result("cpu", 1, "%")).met) == (False, True, None)


def test_the_picture(figures: list[Figure]) -> None:
    picture = ElementTree.fromstring(draw(figures, "a <model>"))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <model>"
    assert {"latency", "throughput", "cpu", "cache", "memory", *(figure.result.metric for figure in figures)} <= {
        *texts
    }
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    bars = list(picture.iter("{http://www.w3.org/2000/svg}rect"))[1:]
    assert len(bars) == len(figures)
    for bar in bars:
        assert 0 <= float(bar.get("x", 0)) + float(bar.get("width", 0)) <= width
        assert 0 <= float(bar.get("y", 0)) + float(bar.get("height", 0)) <= height


def test_a_context_that_is_too_short(smollm2: Path) -> None:
    with pytest.raises(ConfigError, match="the context is 8192 tokens; the suite needs 9004 or more"):
        list(measure_comprehensive(smollm2, suite=Suite(prompts=(9000,), tokens=4)))


def test_the_command_and_the_documented_script(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnemos.bench.comprehensive.DEFAULT_SUITE", SMALL)
    assert main(["bench", str(smollm2), "--suite", "comprehensive", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["metric"] for line in lines][:2] == ["first_token_16", "first_token_72"]
    assert next(line for line in lines if line["metric"] == "streams_1")["target"] == 50
    picture = tmp_path / "figures.svg"
    run = runpy.run_path(str(SCRIPT))["run"]
    assert run(["--model", str(smollm2), "--test_suite", "comprehensive", "--picture", str(picture)]) == 0
    assert "response_16+4" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    assert main(["bench", str(smollm2), "--suite", "all"]) == 2
    assert "suite is 'all'; it must be one of comprehensive" in capsys.readouterr().err
    assert main(["bench", str(smollm2), "--suite", "comprehensive", "--ops"]) == 2
    assert main(["bench", str(smollm2), "--picture", "x.svg"]) == 2
    assert "--picture draws the figures of --suite" in capsys.readouterr().err
