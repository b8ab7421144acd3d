"""Recurrent layers in files for any length: as a scan, as the runtime's own layers, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from mnemos.errors import ModelError  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.recurrent import scanned  # noqa: E402

IDS = torch.tensor([[1, 10, 20, 30, 5], [7, 8, 9, 60, 0]])


class Layers(nn.Module):
    """A GRU in two directions and an LSTM that takes the time first, whose state is returned too."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(61, 12)
        self.first = nn.GRU(12, 8, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(16, 12, num_layers=2, dropout=0.5, **options)
        self.head = nn.Linear(options.get("proj_size") or 12, 61)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.first(self.tokens(ids))
        x, (state, _) = self.second(x.transpose(0, 1))
        return self.head(x.transpose(0, 1)), state


def leaves(answer: Any) -> list[Tensor]:
    found: list[Tensor] = torch.utils._pytree.tree_leaves(answer)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True, "bidirectional": True, "num_layers": 2}),
        (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
        (nn.GRU, {"bidirectional": True, "num_layers": 2}),
        (nn.GRU, {"bias": False, "batch_first": True}),
        (nn.RNN, {"num_layers": 3}),
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    ],
)
def test_a_scan_is_the_layer(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(5, 6, **options).eval()
    with torch.no_grad():
        for shape in ((3, 7, 5), (7, 5), (1, 1, 5)):
            x = torch.randn(shape)
            expected, state = layer(x)
            again = layer(x, state)
            with scanned(layer):
                found, found_state = layer(x)
                found_again = layer(x, state)
            for have, want in zip(
                leaves((found, found_state, found_again)), leaves((expected, state, again)), strict=True
            ):
                np.testing.assert_allclose(have, want, atol=1e-6)
    assert "forward" not in layer.__dict__


def test_a_program_takes_any_length(tmp_path: Path) -> None:
    module = Layers().train()
    exporter = ProgramExporter(module)
    report = exporter.export(tmp_path / "model.pt2", IDS)
    assert {"batch 1, sequence 1", "batch 3, sequence 11"} <= set(report.shapes)
    assert module.training and module.second.training
    loaded, ids = exporter.load_program(tmp_path / "model.pt2"), torch.randint(0, 61, (4, 37))
    with torch.no_grad():
        for have, want in zip(loaded(ids), module.eval()(ids), strict=True):
            np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.slow
def test_onnx_with_weights_of_8_bits_takes_any_length(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from mnemos.export.onnx import ONNXExporter

    report = ONNXExporter(Layers()).export(tmp_path / "model.onnx", IDS, bits=8)
    assert "batch 1, sequence 17" in report.shapes
    report = ONNXExporter(Layers(proj_size=4)).export(tmp_path / "model.onnx", IDS)  # not by tracing
    assert report.error <= 1e-5 and "tracing" not in str(report)


@pytest.mark.slow
def test_openvino_takes_any_length_and_names_what_it_has_no_form_of(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from mnemos.export.openvino import OpenVINOExporter

    report = OpenVINOExporter(Layers()).export(tmp_path / "model.xml", IDS)
    assert "batch 1, sequence 17" in report.shapes and "by tracing" in str(report)
    with pytest.raises(ModelError, match="OpenVINO cannot express aten::lstm"):
        OpenVINOExporter(Layers(proj_size=4)).export(tmp_path / "other.xml", IDS)
