"""`mnemos package`, and the commands that take what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mnemos.cli.main import main
from tests.export.packaging.conftest import llama, words  # noqa: F401  fixtures
from tests.models.checkpoints import Reference


@pytest.fixture
def model(llama: Reference, words: Path, tmp_path: Path) -> Path:  # noqa: F811
    shutil.copytree(llama.folder, tmp_path / "model")
    shutil.copy(words / "tokenizer.json", tmp_path / "model")
    return tmp_path / "model"


def test_there_and_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path / "home"))
    out = tmp_path / "packed"
    assert main(["package", str(model), "--out", str(out), "--tar", "--oci", "--sbom", "--licence", "MIT"]) == 0
    shown = capsys.readouterr()
    assert "model.safetensors" in shown.out and "sha256" in shown.out and "summing the files" in shown.err
    assert (tmp_path / "packed.oci" / "index.json").is_file()
    texts = []
    for source in (model, out, tmp_path / "packed.tar"):
        command = ["generate", str(source), "w5 w9", "--raw", "--max-new-tokens", "4", "--ignore-eos"]
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and texts[0].strip()
    assert main(["models"]) == 0
    assert "packed@" in capsys.readouterr().out
    assert main(["inspect", "packed"]) == 0
    shown = capsys.readouterr()
    assert "all as they were packed" in shown.out and "architecture llama" in shown.out and "MIT" in shown.out
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] is True
    (out / "config.json").write_bytes((out / "config.json").read_bytes().replace(b"256", b"255"))
    for command in ("inspect", "generate"):
        assert main([command, str(out), *(["w1"] if command == "generate" else [])]) == 1
        assert "config.json: its SHA-256 is" in capsys.readouterr().err


def test_what_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--out", str(tmp_path / "p.tar"), "--tar"], "give a folder for --tar and --oci beside it"),
        (["--out", str(tmp_path / "p"), "--exports", "onxn"], "exports names 'onxn'; expected some of onnx"),
        (["--out", str(model)], "model exists; choose another name"),
    ):
        assert main(["package", str(model), *options]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_for_ollama(model: Path, tmp_path: Path) -> None:
    """A folder whose tokenizer GGUF does not have is refused, and nothing is left."""
    assert main(["package", str(model), "--out", str(tmp_path / "p"), "--ollama"]) == 1
    assert not (tmp_path / "p").exists()
