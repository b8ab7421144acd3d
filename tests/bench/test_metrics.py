"""Metrics by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnemos import _native
from mnemos.bench.measure import Subject, measure
from mnemos.bench.metrics import DEFAULT_METRICS, Metric, parse_metrics
from mnemos.bench.results import Result
from mnemos.cli.main import main
from mnemos.errors import CapacityError, ConfigError
from mnemos.machine.figures import Limits
from tests.models.checkpoints import CONFIGS, build
from tests.models.gguf_files import write_gguf

LIMITS = Limits(1e9, {"float32": 1e9, "int8": 1e9})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single GGUF file in its folder: a context of 256, no tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    module = build(CONFIGS["llama"](), folder / "hf").module
    (folder / "gguf").mkdir()
    return write_gguf(module, folder / "gguf" / "small.gguf")


def test_names_say_what_is_measured() -> None:
    assert parse_metrics(["pp512", "tg128", "tg64@d1024", "b32", "rss"]) == [
        Metric("pp512", "pp", 512),
        Metric("tg128", "tg", 128, 16),
        Metric("tg64@d1024", "tg", 64, 959),
        Metric("b32", "b", 32),
        Metric("rss", "rss"),
    ]
    assert len(parse_metrics(DEFAULT_METRICS)) == len(DEFAULT_METRICS)


@pytest.mark.parametrize("name", ["", "pp", "pp0", "tg-1", "b32@d10", "tg128@d100", "warm", "pp99999999999"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="metric"):
        parse_metrics([name])


def test_a_result_is_one_json_line() -> None:
    result = Result("tg128", 150.12345, "tokens/s", limit=300.0)
    assert json.loads(result.to_json()) == {"engine": "mnemos", "metric": "tg128", "value": 150.123, "unit": "tokens/s"}
    assert result.share == pytest.approx(0.5004115)


@pytest.mark.parametrize("names", [",", " ", ""])
def test_no_metric_is_none(names: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(small), "--metrics", names]) == 2
    assert "pp" in capsys.readouterr().err


def test_names_may_have_spaces_around_them(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(small), "--metrics", "pp8, tg1", "--json"]) == 0
    assert [json.loads(line)["metric"] for line in capsys.readouterr().out.splitlines()] == ["pp8", "tg1"]


def test_nothing_is_measured_where_one_metric_cannot_be(small: Path) -> None:
    announced: list[str] = []
    for name in ("pp256", "tg128@d1024"):
        with pytest.raises(ConfigError, match=f"{name} needs .* positions, the model has 256"):
            list(measure(parse_metrics(["cold", "pp8", name]), Subject(small, "auto", LIMITS), announced.append))
    assert announced == []


def test_without_names_what_cannot_be_measured_says_why(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(small), "--json"]) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    values = {figure["metric"]: figure["value"] for figure in figures}
    reasons = {figure["metric"]: figure["unit"] for figure in figures if figure["value"] is None}
    assert set(values) == set(DEFAULT_METRICS)
    assert all(values[name] > 0 for name in ("pp128", "tg128", "b8", "b32"))
    assert "needs 513 positions, the model has 256" in reasons["pp512"]
    assert all("tokenizer" in reasons[name] for name in ("cold", "rss", "sampling"))


def test_a_folder_is_as_large_as_the_model_in_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for path in (small, small.parent):
        assert main(["bench", str(path), "--metrics", "tg1"]) == 0
        shown.append(capsys.readouterr().out.splitlines()[0].split(", ")[1])
    assert shown[0] == shown[1] != "0 B"


def test_a_broken_file_is_named_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"no model at all")
    assert main(["bench", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"mnemos: error: {file}: magic")


def test_more_sequences_than_fit_into_memory_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_memory", lambda: 10**9)
    subject = Subject(small, "auto", LIMITS)
    with pytest.raises(CapacityError, match="999999 sequences needs .* are missing"):
        list(measure(parse_metrics(["b999999"]), subject, lambda what: None))
