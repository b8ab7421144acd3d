"""ONNX for TensorRT: checked, with the command that builds the engine."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

from mnemos.errors import ConfigError  # noqa: E402
from mnemos.export.formats import FORMATS, ExportSource  # noqa: E402
from mnemos.export.tensorrt import TensorRTExporter  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.export.test_module_exporters import IDS, Tied  # noqa: E402
from tests.models.checkpoints import CONFIGS, build  # noqa: E402


def arguments(script: Path) -> list[str]:
    """What the script calls trtexec with: a trtexec of the test's own prints it."""
    tool = script.parent / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([script, "--fp16"], env={"PATH": path}, capture_output=True, text=True, check=True)
    folder, *given = done.stdout.splitlines()
    assert folder == str(script.parent)
    return given


@pytest.mark.skipif(os.name == "nt", reason="the script is for a POSIX shell")
def test_the_script_builds_an_engine_for_the_sizes_asked_for(tmp_path: Path) -> None:
    exporter = TensorRTExporter(Tied(), sizes={"batch": (1, 4, 16)})
    report = exporter.export(tmp_path / "my model.onnx", IDS, ["input_ids"], ["logits"])
    assert report.error is not None and report.error <= 1e-5 and "no engine was built" in str(report)
    assert arguments(tmp_path / "my model.trtexec.sh") == [
        "--onnx=my model.onnx", "--saveEngine=my model.plan", "--skipInference",
        "--minShapes=input_ids:1x1", "--optShapes=input_ids:4x128", "--maxShapes=input_ids:16x512", "--fp16",
    ]  # fmt: skip


def test_a_built_in_architecture_s_cache_has_a_profile(tmp_path: Path) -> None:
    config = CONFIGS["llama-tied"]()
    config.num_hidden_layers = 1
    source = ExportSource(open_checkpoint(build(config, tmp_path / "folder").folder))
    path = tmp_path / FORMATS["tensorrt"].path
    report = FORMATS["tensorrt"].write(source, path)
    assert report.error is not None and report.error <= 5e-5
    words = shlex.split(path.with_suffix(".trtexec.sh").read_text(), comments=True)
    shapes = next(word for word in words if word.startswith("--optShapes="))
    assert shapes.startswith("--optShapes=input_ids:1x128,attention_mask:1x256,past_key_values.0.key:1x1x128x16,")


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sizes has \(4, 1, 2\) for batch; expected its smallest, usual and largest"):
        TensorRTExporter(Tied(), sizes={"batch": (4, 1, 2)})
    with pytest.raises(ConfigError, match="sizes has 'rows'; expected some of batch, sequence"):
        TensorRTExporter(Tied(), sizes={"rows": (1, 1, 2)}).export(tmp_path / "model.onnx", IDS)
    assert not list(tmp_path.iterdir())
