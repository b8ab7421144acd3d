"""ONNX files with weights of 8 and 4 bits: sizes, errors, and which weights they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package)
from torch import Tensor, nn  # noqa: E402

from mnemos.errors import ConfigError  # noqa: E402
from mnemos.export import onnx as exporting  # noqa: E402
from mnemos.export.exporter import parameter_bytes  # noqa: E402
from mnemos.export.onnx import ONNXExporter  # noqa: E402

IDS = torch.tensor([[1, 10, 20, 30]])


class Wide(nn.Module):
    """Products in every form: with a bias, over rows, of a bare parameter, a tied head, rows of no whole block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.inner, self.outer = nn.Embedding(211, 64), nn.Linear(64, 100), nn.Linear(100, 64, bias=False)
        self.by_hand = nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(64, 211, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.outer(torch.relu(self.inner(x))) @ self.by_hand
        x = x + self.inner(x.reshape(-1, 64))[:, :64].view(x.shape)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(("bits", "error", "size"), [(8, 0.03, 0.35), (4, 0.2, 0.25)])
def test_all_products_and_the_tied_embedding_have_few_bits(
    bits: int, error: float, size: float, tmp_path: Path
) -> None:
    module = Wide()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = ONNXExporter(module).export(tmp_path / "model.onnx", IDS, bits=bits)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert report.error < error and "root mean square" in str(report) and f"{bits} bits" in str(report)
    assert report.bytes < size * parameter_bytes(module)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 5 and kinds.count("GatherBlockQuantized") == 1
    assert not {"MatMul", "Gemm", "Gather", "Transpose"} & set(kinds)


def test_weights_that_four_bits_hold_are_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape) / 4)
            parameter[:, 0] = -2  # the largest of its block, which sets the scale
    report = ONNXExporter(module).export(tmp_path / "model.onnx", IDS, bits=4)
    assert report.error < 0.01  # what rounding activations to 8 bits costs


def test_weights_in_the_wrong_places_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*given: Any) -> Any:
        values = rounded(*given)
        return {name: value[::-1].copy() for name, value in values.items()}

    rounded = exporting.round_weights
    monkeypatch.setattr(exporting, "round_weights", changed)
    with pytest.raises(Exception, match="differs from the module by"):
        ONNXExporter(Wide()).export(tmp_path / "model.onnx", IDS, bits=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits is 5; expected 8 or 4"),
        ({"bits": 4, "opset_version": 14}, "opset_version is 14; weights of 4 bits need 18"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ONNXExporter(Wide()).export(tmp_path / "model.onnx", IDS, **arguments)
