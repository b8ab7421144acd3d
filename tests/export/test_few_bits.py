"""Built-in architectures in ONNX with weights of 8 and 4 bits: all of them, with a cache as without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package)

from mnemos.export.formats import FORMATS, TOLERANCE, ExportSource  # noqa: E402
from mnemos.export.onnx import ONNXExporter, load_onnx  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.models.checkpoints import CONFIGS, build, token_ids  # noqa: E402

# The largest relative error of random weights in so many bits, and of activations in 8.
LARGEST = {8: 0.06, 4: 0.6}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def singly(session: Any, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of a file with a cache: a prompt at once, and the other tokens one at a time."""
    inputs = {one.name: one for one in session.get_inputs()}
    past = {name: one for name, one in inputs.items() if name.startswith("past")}
    held = {name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for name, one in past.items()}
    rows, begin = [], 0
    for end in range(prompt, len(ids) + 1):
        fed = {"input_ids": np.array([ids[begin:end]]), "attention_mask": np.ones((1, end), np.int64)}
        logits, *present = session.run(None, fed | held)
        held, begin = dict(zip(past, present, strict=True)), end
        rows.append(logits[0])
    return np.concatenate(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_architecture(name: str, bits: int, tmp_path: Path) -> None:
    reference = build(CONFIGS[name](), tmp_path / "model")
    source = ExportSource(open_checkpoint(reference.folder))
    whole, cached = tmp_path / "whole.onnx", tmp_path / "cached" / "model.onnx"
    reports = [
        ONNXExporter(source.form, TOLERANCE).export(whole, bits=bits),
        FORMATS[f"onnx-int{bits}"].write(source, cached),
    ]
    assert all(report.error <= LARGEST[bits] for report in reports)
    for path in (whole, cached):
        floats = [one for one in onnx.load(path).graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
        assert not [one.name for one in floats if len(one.dims) == 2 and min(one.dims) >= 32]
    ids = token_ids(12)
    expected = reference.logits(ids)
    (found,) = load_onnx(whole).run(None, {"input_ids": np.array([ids])})
    assert apart(found[0], expected) <= LARGEST[bits]
    assert apart(singly(load_onnx(cached), ids, 7), found[0]) <= 0.05  # activations are rounded in other groups
