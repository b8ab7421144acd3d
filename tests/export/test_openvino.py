"""OpenVINO's files: own modules, and built-in architectures whose cache the runtime keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from mnemos.errors import ConfigError, FormatError, ModelError  # noqa: E402
from mnemos.export.exporter import parameter_bytes  # noqa: E402
from mnemos.export.formats import FORMATS, ExportSource  # noqa: E402
from mnemos.export.openvino import OpenVINOExporter  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.export.test_module_exporters import IDS, Branching, Tied, modes  # noqa: E402
from tests.models.checkpoints import CONFIGS, build, token_ids  # noqa: E402


def test_a_module_runs_at_other_sizes_and_its_tied_weights_are_stored_once(tmp_path: Path) -> None:
    module = Tied()
    exporter, before = OpenVINOExporter(module), modes(module)
    report = exporter.export(tmp_path / "model.xml", IDS, ["input_ids"], ["scores"])
    assert modes(module) == before and report.error <= 1e-5 and len(report.shapes) >= 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert (tmp_path / "model.bin").stat().st_size <= 1.05 * parameter_bytes(module)
    compiled = exporter.load_openvino(tmp_path / "model.xml")
    ids = np.full((3, 9), 7)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(compiled({"input_ids": ids})["scores"], expected, atol=1e-5)


def test_the_runtime_keeps_a_built_in_architecture_s_cache(tmp_path: Path) -> None:
    config = CONFIGS["llama-tied"]()
    config.num_hidden_layers = 2
    source = ExportSource(open_checkpoint(build(config, tmp_path / "folder").folder))
    form = source.form
    path = tmp_path / "model.xml"
    report = FORMATS["openvino"].write(source, path)
    assert report.error <= 1e-5 and any("past 20" in shape for shape in report.shapes)
    request = OpenVINOExporter(form).load_openvino(path).create_infer_request()
    ids = np.array(token_ids(22)).reshape(2, 11)
    with torch.no_grad():
        expected = form(torch.from_numpy(ids)).numpy()

    def step(start: int, stop: int, beams: list[int]) -> Any:
        fed = {"input_ids": ids[beams, start:stop], "attention_mask": np.ones((2, stop), np.int64)}
        return request.infer(fed | {"beam_idx": np.array(beams, np.int32)})["logits"].copy()

    for _ in range(2):  # a state that is reset is as it was
        request.reset_state()
        found = [step(0, 5, [0, 1]), step(5, 6, [0, 1]), step(6, 11, [0, 1])]
        np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=2e-5)
    request.reset_state()
    step(0, 5, [0, 1])
    np.testing.assert_allclose(step(5, 11, [1, 1])[0], expected[1, 5:], atol=2e-5)  # both rows go on from the second


def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="branches on the data, in forward"):
        OpenVINOExporter(Branching()).export(tmp_path / "model.xml", IDS)
    with pytest.raises(ConfigError, match="expected a name that ends in .xml"):
        OpenVINOExporter(Tied()).export(tmp_path / "model.bin", IDS)
    with pytest.raises(ConfigError, match="state has 'ids': 'logits'; expected an input after the first"):
        OpenVINOExporter(Tied()).export(tmp_path / "model.xml", IDS, state={"ids": "logits"})
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.xml").write_text("text")
    with pytest.raises(FormatError, match="OpenVINO cannot load it"):
        OpenVINOExporter(Tied()).load_openvino(tmp_path / "text.xml")
