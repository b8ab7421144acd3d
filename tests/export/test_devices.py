"""ExecuTorch, LiteRT and Core ML: what is refused without them, and files converted and run in their own processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.errors import CapacityError, ConfigError, FormatError, MissingDependencyError, ModelError  # noqa: E402
from mnemos.export.causes import obstacle  # noqa: E402
from mnemos.export.coreml import CoreMLExporter  # noqa: E402
from mnemos.export.environments import DEVICES  # noqa: E402
from mnemos.export.example import example_of  # noqa: E402
from mnemos.export.executorch import ExecuTorchExporter  # noqa: E402
from mnemos.export.formats import FORMATS, ExportSource  # noqa: E402
from mnemos.export.litert import LiteRTExporter  # noqa: E402
from mnemos.export.programs import exported_program  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.export.test_module_exporters import IDS, Branching, ByKeyword, Tied, modes  # noqa: E402
from tests.export.test_module_styles import (  # noqa: E402
    ComplexRotation,
    MaskFromABuffer,
    Recurrent,
    ScatteredExperts,
)
from tests.models.checkpoints import CONFIGS, build, token_ids  # noqa: E402


def having(exporter: Any) -> None:
    """Skips the test, which takes up to a minute, unless MNEMOS_TEST_DEVICES is set; then the runtime's environment is
    made first where it is missing (2.5 GB)."""
    if not os.environ.get("MNEMOS_TEST_DEVICES"):
        pytest.skip("takes up to a minute; runs with MNEMOS_TEST_DEVICES=1")
    DEVICES.python(exporter.packages, exporter.runtime, make=True)


@pytest.mark.parametrize("exporter", [ExecuTorchExporter, LiteRTExporter, CoreMLExporter])
def test_a_missing_runtime_is_named_and_nothing_is_written(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    monkeypatch.setattr("mnemos.export.environments.version", lambda package: "0.0.1")
    with pytest.raises(MissingDependencyError, match=r"needs torch 2\.13, .* and here torch is 0\.0\.1; make an env"):
        exporter(Tied()).export(tmp_path / "model.mlpackage", IDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("exporter", "arguments", "message"),
    [
        (ExecuTorchExporter, {"max_length": 1}, "max_length is 1; expected a number from 2"),
        (ExecuTorchExporter, {"max_length": 3}, "max_length is 3; expected at least dummy_input's 4"),
        (LiteRTExporter, {"lengths": ()}, r"lengths is \(\); expected different numbers"),
        (LiteRTExporter, {"lengths": (1, 1)}, r"lengths is \(1, 1\); expected different numbers"),
        (CoreMLExporter, {"max_length": True}, "max_length is True; expected a number from 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    exporter: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        exporter(Tied()).export(tmp_path / "model.mlpackage", IDS, **arguments)
    with pytest.raises(ConfigError, match="path is '.*'; expected a name that ends in .mlpackage"):
        CoreMLExporter(Tied()).export(tmp_path / "model.onnx", IDS)


@pytest.mark.parametrize(
    ("exporter", "arguments"),
    [
        (ExecuTorchExporter, {"max_length": 100}),
        (LiteRTExporter, {"lengths": (1, 100)}),
        (CoreMLExporter, {"max_length": 100}),
    ],
)
def test_a_length_that_the_module_does_not_take_is_named(
    exporter: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    message = r"Tied does not take a length of 100: IndexError: .*; the longest that it takes is 64"
    with pytest.raises(ModelError, match=message):
        exporter(Tied()).export(tmp_path / "model.mlpackage", IDS, **arguments)


def test_what_no_device_has_a_form_of_is_found_in_a_program() -> None:
    def found(module: Any) -> str:
        return obstacle(exported_program(module.eval(), example_of(module, IDS), 1))

    assert found(Tied()) == ""
    assert found(ComplexRotation()).startswith("complex numbers, in ")
    message = r"a size that depends on the data, in \w+ \(test_module_styles.py, line \d+\); compute all rows"
    assert re.match(message, found(ScatteredExperts()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("exporter", [ExecuTorchExporter, LiteRTExporter, CoreMLExporter])
def test_recurrent_layers_and_tables_of_fewer_positions_than_usual(exporter: Any, tmp_path: Path) -> None:
    having(exporter)
    name = f"model.{'mlpackage' if exporter is CoreMLExporter else 'bin'}"
    for module in (Recurrent(), MaskFromABuffer()):
        report = exporter(module).export(tmp_path / name, IDS)
        assert report.error is not None or "not run" in str(report)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("exporter", [ExecuTorchExporter, LiteRTExporter, CoreMLExporter])
def test_what_a_device_has_no_form_of_is_named(exporter: Any, tmp_path: Path) -> None:
    having(exporter)
    with pytest.raises(ModelError, match=r"has no form of a size that depends on the data, in \w+ \(test_module"):
        exporter(ScatteredExperts()).export(tmp_path / "model.mlpackage", IDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_executorch_runs_every_length_up_to_the_longest(tmp_path: Path) -> None:
    having(ExecuTorchExporter)
    module = Tied().train()
    exporter, before = ExecuTorchExporter(module), modes(module)
    report = exporter.export(tmp_path / "model.pte", IDS, max_length=48)
    assert report.error is not None and report.error <= 1e-5 and modes(module) == before
    assert {"sequence 1", "sequence 48"} <= set(report.shapes)
    ids = torch.tensor([[5] * 29])
    with exporter.load_executorch(tmp_path / "model.pte") as file:
        with torch.no_grad():
            np.testing.assert_allclose(file(ids)["output_0"], module.eval()(ids).numpy(), atol=1e-4)
        with pytest.raises(ConfigError, match=r"input_0 has the shape \(1, 49\); the file takes up to \(1, 48\)"):
            file(torch.ones((1, 49), dtype=torch.int64))
        with pytest.raises(ConfigError, match="input_0 is of type int32; the file takes int64"):
            file(ids.to(torch.int32))
    with pytest.raises(ModelError, match="branches on the data, in forward"):
        ExecuTorchExporter(Branching()).export(tmp_path / "other.pte", IDS)
    (tmp_path / "text.pte").write_text("text")
    with pytest.raises(FormatError, match="text.pte: cannot be loaded"):
        exporter.load_executorch(tmp_path / "text.pte")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pte", "text.pte"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_litert_has_a_signature_for_each_length_and_names_for_all(tmp_path: Path) -> None:
    having(LiteRTExporter)
    module = ByKeyword()
    exporter = LiteRTExporter(module)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    report = exporter.export(tmp_path / "model.tflite", given, ["ids", "mask"], ["scores"], lengths=(1, 7, 20))
    assert report.error is not None and report.error <= 1e-5
    assert report.shapes == ("sequence 1", "sequence 7", "sequence 20")
    assert report.bytes < 1.5 * report.parameter_bytes  # signatures share the weights
    ids = torch.full((1, 7), 9)
    with exporter.load_litert(tmp_path / "model.tflite") as file:
        found = file(ids=ids, mask=torch.ones_like(ids))["scores"]
        with torch.no_grad():
            np.testing.assert_allclose(found, module.eval()(input_ids=ids)["logits"].numpy(), atol=1e-4)
        with pytest.raises(ConfigError, match=r"has fixed shapes, and takes length_1 .*; length_7 .*; length_20"):
            file(ids=IDS, mask=IDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_core_ml_s_package_is_read_again(tmp_path: Path) -> None:
    having(CoreMLExporter)
    exporter, path = CoreMLExporter(Tied()), tmp_path / "model.mlpackage"
    for half in (False, True):  # the second replaces the first
        report = exporter.export(path, IDS, ["input_ids"], ["logits"], max_length=48, half=half)
        assert report.error is None or report.error <= 1e-5
    assert 0.5 <= report.bytes / report.parameter_bytes < 1
    with exporter.load_coreml(path) as file:
        assert file.about["inputs"] == {"input_ids": {"sizes": [[1, 1], [1, 48]], "type": "INT32"}}
        assert file.about["outputs"] == ["logits"] and "gather" in file.about["operators"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.mlpackage"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["executorch", "litert", "coreml"])
def test_a_built_in_architecture(name: str, tmp_path: Path) -> None:
    having({"executorch": ExecuTorchExporter, "litert": LiteRTExporter, "coreml": CoreMLExporter}[name])
    source = ExportSource(open_checkpoint(build(CONFIGS["llama"](), tmp_path / "folder").folder))
    report = FORMATS[name].write(source, tmp_path / FORMATS[name].path)
    assert report.error is not None or "not run" in str(report)
    if name == "executorch":
        ids = torch.tensor([token_ids(9)])
        with ExecuTorchExporter(source.form).load_executorch(report.path) as file, torch.no_grad():
            np.testing.assert_allclose(file(ids)["output_0"], source.form(ids).numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a process's files")
def test_a_full_disk_is_named_by_the_other_process(tmp_path: Path) -> None:
    import resource

    having(ExecuTorchExporter)
    module = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(CapacityError, match="model.pte: cannot be written: File too large"):
            ExecuTorchExporter(module).export(tmp_path / "model.pte", IDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
