"""`mnemos export`, from a small folder."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mnemos.cli.main import main
from mnemos.export.genai import DecoderExporter
from tests.models.checkpoints import CONFIGS, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CONFIGS["llama"](), tmp_path_factory.mktemp("model")).folder


def test_a_table_says_what_was_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "torchscript,pt2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["format", "torchscript", "pt2"]
    assert "writing pt2 and comparing it" in shown.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt", "model.pt2"]


def test_files_that_exist_and_formats_that_do_not_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt").write_text("mine")
    assert main(["export", str(folder), "--to", "torchscript", "--out", str(tmp_path)]) != 0
    assert "model.pt exists; choose another folder, or replace it with --overwrite" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_text() == "mine"
    assert main(["export", str(folder), "--to", "onxx", "--out", str(tmp_path)]) != 0
    assert "--to is 'onxx'; expected some of onnx" in capsys.readouterr().err


def test_a_format_that_fails_is_named_and_the_others_are_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(DecoderExporter, "_write", fails)
    out = tmp_path / "out"
    assert main(["export", str(folder), "--to", "torchscript,onnx,pt2", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["format", "torchscript", "pt2"]
    assert "mnemos: error: onnx: WithCache cannot be exported to ONNX file: ZeroDivisionError: why" in shown.err
    assert sorted(file.name for file in out.iterdir()) == ["model.pt", "model.pt2"]  # no folder for onnx
    assert main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "none")]) == 1
    assert not capsys.readouterr().out and not (tmp_path / "none").exists()


def test_without_pytorch_files_are_written_and_the_rest_names_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("mnemos.export.requirements.version", none)
    assert main(["export", str(folder), "--to", "safetensors,onnx", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["format", "safetensors"]
    assert "onnx: exporting to onnx needs torch 2.6 or newer; run: pip install 'mnemos[export]'" in shown.err


@pytest.mark.parametrize(("package", "oldest"), [("onnx", "1.17"), ("onnxscript", "0.3"), ("onnxruntime", "1.20")])
def test_a_version_that_is_too_old_is_named_and_the_others_are_written(
    package: str, oldest: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    monkeypatch.setattr(
        "mnemos.export.requirements.version", lambda asked: "0.1.9" if asked == package else version(asked)
    )
    assert main(["export", str(folder), "--to", "onnx,gguf", "--out", str(tmp_path)]) == 1
    assert (
        f"onnx: exporting to ONNX needs {package} {oldest} or newer, and 0.1.9 is installed; "
        "run: pip install 'mnemos[export]'" in capsys.readouterr().err
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def fails(*_: object) -> list[str]:
    raise ZeroDivisionError("why")


def test_gguf_files_and_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "gguf,gguf-Q8_0,safetensors-bf16", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["format", "gguf", "gguf-Q8_0", "safetensors-bf16"]
    assert "has no tokenizer; the GGUF file takes token ids only" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-q8_0.gguf", "model.gguf", "safetensors-bf16"]
    assert main(["export", str(folder), "--to", "gguf-q4", "--out", str(tmp_path)]) != 0
    assert "type is 'q4'; the types are f32, f16" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "x"), "--drop-memory"]) != 0
    assert "has no memory to drop; leave drop_memory out" in capsys.readouterr().err
