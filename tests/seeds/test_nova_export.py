"""The NOVA document's examples of exporting, as they are written there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from mnemos import DistilledModel, ONNXExporter, TorchScriptExporter  # noqa: E402


class Small(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(100, width), nn.Linear(width, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(input_ids)))
        return logits


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = Small()

    exporter = ONNXExporter(model)

    # Export with dynamic batch size
    exporter.export(
        path="model.onnx",
        dummy_input=torch.randint(0, 100, (1, 10)),
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"}},
        opset_version=14,
    )

    # Load for inference
    session = exporter.load_onnx("model.onnx")

    # Run inference
    input_ids = np.array([[1, 10, 20, 30]], dtype=np.int64)
    outputs = session.run(None, {"input_ids": input_ids})

    with torch.no_grad():
        np.testing.assert_allclose(outputs[0], model.eval()(torch.from_numpy(input_ids)).numpy(), atol=1e-5)


def test_torchscript() -> None:
    model, input_ids = Small(), torch.tensor([[1, 10, 20, 30]])

    exporter = TorchScriptExporter(model)

    # Trace method (example-based)
    dummy_input = torch.randint(0, 100, (1, 10))
    exporter.export("model.pt", dummy_input, method="trace")
    with torch.no_grad():
        expected = model.eval()(input_ids)
        assert torch.equal(exporter.load_torchscript("model.pt")(input_ids), expected)

    # Script method (code analysis)
    exporter.export("model.pt", method="script")

    # Load for inference
    loaded_model = exporter.load_torchscript("model.pt")
    output = loaded_model(input_ids)

    assert torch.equal(output, expected)


def test_mobile_deployment() -> None:
    dataloader = [(torch.randint(0, 100, (2, 8)), torch.randint(0, 100, (2, 8))) for _ in range(3)]

    # Train small student model
    teacher = Small(32)
    student = Small()
    distilled = DistilledModel(student, teacher, temperature=2.0, alpha=0.5)

    # Training loop
    optimizer = torch.optim.Adam(student.parameters())
    for batch in dataloader:
        inputs, labels = batch
        loss = distilled.train_step(inputs, labels, optimizer)
        assert loss > 0

    # Export for mobile
    exporter = TorchScriptExporter(student)
    exporter.export("mobile_model.pt", method="script")

    with torch.no_grad():
        assert torch.equal(exporter.load_torchscript("mobile_model.pt")(inputs), student.eval()(inputs))
