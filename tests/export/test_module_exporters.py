"""Own modules exported to ONNX, TorchScript and torch.export, compared on sizes and values that tracing never saw."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from mnemos.compress.modules.quantized_model import QuantizedModel  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, ModelError  # noqa: E402
from mnemos.export.example import example_of  # noqa: E402
from mnemos.export.exporter import parameter_bytes  # noqa: E402
from mnemos.export.onnx import ONNXExporter, file_opset  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.torchscript import TorchScriptExporter  # noqa: E402

IDS = torch.tensor([[1, 10, 20, 30]])
AXES = {"input_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"}}


class Tied(nn.Module):
    """Learned positions, RMSNorm, dropout, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.positions = nn.Embedding(211, 32), nn.Embedding(64, 32)
        self.norm, self.linear, self.dropout = nn.RMSNorm(32), nn.Linear(32, 32), nn.Dropout(0.5)
        self.head = nn.Linear(32, 211, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.dropout(torch.relu(self.linear(self.norm(x))))
        logits: Tensor = self.head(x)
        return logits


class Branching(Tied):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if x.sum() > 0:
            x = 2 * x
        logits: Tensor = self.head(x)
        return logits


class ByKeyword(Tied):
    def forward(self, *, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        return {"loss": None, "logits": super().forward(input_ids)}


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


@pytest.fixture
def module() -> Tied:
    module = Tied().train()
    module.linear.eval()
    return module


def onnx(module: nn.Module) -> ONNXExporter:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return ONNXExporter(module)


@pytest.mark.parametrize("opset", [14, 20])
def test_an_onnx_file_has_the_opset_asked_for_one_copy_of_tied_weights_and_named_axes(
    module: Tied, tmp_path: Path, opset: int
) -> None:
    before = modes(module)
    exporter = onnx(module)
    report = exporter.export(str(tmp_path / "model.onnx"), IDS, ["input_ids"], ["logits"], AXES, opset_version=opset)
    assert modes(module) == before
    assert file_opset(tmp_path / "model.onnx") == opset
    assert report.error <= 1e-5 and report.inputs >= 6 and len(report.shapes) >= 3
    assert report.bytes - parameter_bytes(module) < 20_000  # the graph itself; a second head would be 27 kB more
    assert b"test_module_exporters" not in (tmp_path / "model.onnx").read_bytes()  # no paths of source files
    session = exporter.load_onnx(tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["input_ids"]
    assert session.get_inputs()[0].shape == ["batch", "sequence"]
    ids = np.array([[5] * 9, [7] * 9, [210] * 9], dtype=np.int64)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, atol=1e-5)
    assert exporter.verify(tmp_path / "model.onnx", IDS) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_a_module_on_a_gpu_is_exported_as_it_is_on_the_cpu(tmp_path: Path, place: str) -> None:
    module = Tied().cuda()
    for make in (onnx, TorchScriptExporter, ProgramExporter):
        assert make(module).export(tmp_path / "model", IDS.to(place)).error <= 1e-5
    assert module.head.weight.is_cuda


def test_verifying_runs_the_module_once_on_each_input(module: Tied, tmp_path: Path) -> None:
    exporter = onnx(module)
    exporter.export(tmp_path / "model.onnx", IDS)
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    exporter.verify(tmp_path / "model.onnx", IDS)
    assert len(seen) > 6 and sum(torch.equal(ids, IDS) for ids in seen) == 1


def test_a_module_that_fails_on_the_example_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Tied fails on dummy_input: IndexError: index out of range"):
        TorchScriptExporter(Tied()).export(tmp_path / "model.pt", torch.full((1, 2), 5000))


def test_running_statistics_stay_as_they_were(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    TorchScriptExporter(module).export(tmp_path / "model.pt", torch.randn(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_file_of_another_model_does_not_pass_verification(module: Tied, tmp_path: Path) -> None:
    exporter = onnx(module)
    exporter.export(tmp_path / "model.onnx", IDS)
    with torch.no_grad():
        module.linear.bias += 0.1
    with pytest.raises(ModelError, match="differs from the module by"):
        exporter.verify(tmp_path / "model.onnx", IDS)


@pytest.mark.parametrize("method", ["trace", "script"])
def test_a_torchscript_file_gives_the_module_s_own_numbers(module: Tied, tmp_path: Path, method: Any) -> None:
    exporter, before = TorchScriptExporter(module), modes(module)
    report = exporter.export(tmp_path / "model.pt", IDS, method=method)
    assert report.error == 0 and modes(module) == before
    ids = torch.full((3, 13), 7)
    with torch.no_grad():
        assert torch.equal(exporter.load_torchscript(tmp_path / "model.pt")(ids), module.eval()(ids))


def test_a_program_runs_at_other_sizes_without_the_module(module: Tied, tmp_path: Path) -> None:
    exporter = ProgramExporter(module)
    assert exporter.export(tmp_path / "model.pt2", IDS).error == 0
    ids = torch.full((1, 1), 3)
    with torch.no_grad():
        assert torch.equal(exporter.load_program(tmp_path / "model.pt2")(ids), module.eval()(ids))


def test_a_branch_on_data_is_kept_by_script_and_refused_elsewhere(tmp_path: Path) -> None:
    module = Branching()
    (tmp_path / "model.pt").write_text("what was there before")
    with pytest.raises(ModelError, match=r"differs from the module by 0\.\d+ at batch \d"):
        TorchScriptExporter(module).export(tmp_path / "model.pt", IDS)
    assert (tmp_path / "model.pt").read_text() == "what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    with pytest.raises(ModelError, match=r"branches on the data, in forward \(test_module_exporters.py, line \d+\)"):
        ProgramExporter(module).export(tmp_path / "model.pt2", IDS)
    assert TorchScriptExporter(module).export(tmp_path / "model.pt", method="script").error == 0


def test_an_old_onnx_file_that_froze_a_branch_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a branch that depends on the data"):
        onnx(Branching()).export(tmp_path / "model.onnx", IDS, opset_version=14)
    assert not list(tmp_path.iterdir())


def test_keyword_only_arguments_and_mappings_as_answers(tmp_path: Path) -> None:
    module = ByKeyword()
    report = TorchScriptExporter(module).export(tmp_path / "model.pt", {"input_ids": IDS})
    assert "of the answer alone" in str(report)
    assert (
        onnx(module).export(tmp_path / "m.onnx", {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}).error
        < 1e-5
    )


def test_a_quantized_model_is_exported_with_its_rounded_weights(module: Tied, tmp_path: Path) -> None:
    quantized = QuantizedModel(module.eval(), bits=8)
    exporter = TorchScriptExporter(quantized)  # type: ignore[arg-type]
    exporter.export(tmp_path / "model.pt", IDS)
    with torch.no_grad():
        found, expected = exporter.load_torchscript(tmp_path / "model.pt")(IDS), quantized.dequantize()(IDS)
    assert torch.equal(found, expected)


def test_lengths_that_the_module_refuses_are_named(tmp_path: Path) -> None:
    module = Tied()
    module.positions = nn.Embedding(12, 32)
    report = ProgramExporter(module).export(tmp_path / "model.pt2", IDS)
    assert "does not take batch 1, sequence 17" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dummy_input": [1, 2]}, "dummy_input has 2 tensors; forward takes ids"),
        ({"dummy_input": ("a",)}, "dummy_input has 'a' for ids; expected a tensor"),
        ({"dummy_input": {"x": IDS}}, "dummy_input has 'x'; forward takes ids"),
        ({"dummy_input": IDS, "input_names": ["a", "b"]}, "expected a name for each"),
        ({"dummy_input": IDS, "output_names": ["a", "b"]}, "output_names has 2 names; the module returns 1"),
        ({"dummy_input": IDS, "output_names": ["y"], "dynamic_axes": {"z": {0: "n"}}}, "expected one of ids, y"),
        ({"dummy_input": IDS, "dynamic_axes": {"ids": {2: "n"}}}, "has the axis 2; expected 0 to 1"),
        ({"dummy_input": IDS, "opset_version": 99}, "opset_version is 99; expected 9 to"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        onnx(Tied()).export(tmp_path / "model.onnx", **arguments)


def test_paths_that_cannot_be_written_are_named(module: Tied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = TorchScriptExporter(module)
    with pytest.raises(ConfigError, match="is a folder"):
        exporter.export(tmp_path, IDS)
    with pytest.raises(FormatError, match="not a TorchScript file"):
        (tmp_path / "text.pt").write_text("text")
        exporter.load_torchscript(tmp_path / "text.pt")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CapacityError, match="its weights need 0.0 MB, and the disk has 0.0 MB free"):
        exporter.export(tmp_path / "model.pt", IDS)
    assert [file.name for file in tmp_path.iterdir()] == ["text.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a process's files")
@pytest.mark.parametrize("name", ["model.onnx", "model.pt", "model.pt2", "model.xml"])
def test_a_full_disk_is_named_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """With a real limit: what writes a file in C++ may end the process, or say nothing at all."""
    import resource

    exporter: Any = {"model.pt": TorchScriptExporter, "model.pt2": ProgramExporter}.get(name)
    if exporter is None:
        pytest.importorskip("openvino" if name == "model.xml" else "onnxruntime")
        from mnemos.export.openvino import OpenVINOExporter

        exporter = OpenVINOExporter if name == "model.xml" else ONNXExporter
    module = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CapacityError, match=f"{name}: cannot be written: .*with room"):
            exporter(module).export(tmp_path / name, IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


class Crossing(Tied):
    """As decoders with an encoder: two texts, of lengths of their own."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        x, y = self.tokens(source), self.tokens(target)
        logits: Tensor = self.head(y + (y @ x.mT).softmax(-1) @ x)
        return logits


def test_texts_of_different_lengths_vary_apart(tmp_path: Path) -> None:
    given = (torch.ones((2, 5), dtype=torch.int64), torch.ones((2, 3), dtype=torch.int64))
    report = ProgramExporter(Crossing()).export(tmp_path / "model.pt2", given)
    assert {"batch 2, sequence 5, target_sequence 3", "batch 3, sequence 11, target_sequence 12"} <= set(report.shapes)


def test_the_values_tried_cover_the_vocabulary_and_sizes_of_one() -> None:
    example = example_of(Tied(), IDS)
    tried = list(example.others())
    assert max(int(tensors["ids"].max()) for _, _, tensors in tried) == 210
    assert {tuple(tensors["ids"].shape) for _, _, tensors in tried} >= {(1, 1), (1, 4), (3, 11)}
