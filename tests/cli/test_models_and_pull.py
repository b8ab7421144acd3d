"""`mnemos pull` and `mnemos models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnemos.cli.main import main
from mnemos.hub import cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    folder = cache.folder_for("hf:org/name")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(5_000_000))
    return tmp_path


def test_the_list_has_sizes_and_what_could_be_fetched(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    here, known = capsys.readouterr().out.splitlines()
    assert here.split()[:3] == ["hf:org/name", "5", "MB"]
    assert known.split()[:3] == ["smollm2-135m", "98.4", "MB"] and "not fetched" in known


def test_the_list_as_json(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    path = str(cache.folder_for("hf:org/name"))
    assert json.loads(capsys.readouterr().out) == [{"name": "hf:org/name", "size": 5_000_000, "path": path}]


def test_removing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--remove", "hf:org/name"]) == 0
    assert capsys.readouterr().out == "removed hf:org/name, 5 MB freed\n"
    assert main(["models", "--remove", "hf:org/name"]) == 1
    assert "is not in" in capsys.readouterr().err


def test_pull_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert main(["pull", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"


def test_pull_of_an_unknown_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm"]) == 1
    assert "known name (smollm2-135m)" in capsys.readouterr().err
