"""Memory-augmented models in other runtimes' formats: the banks inside, the published models' logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.errors import UnsupportedError  # noqa: E402
from mnemos.export.formats import export_model  # noqa: E402
from mnemos.export.onnx import ONNXExporter  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.torch_form import TorchForm, WithCache, cache_example  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.models.memory_transformer.conftest import base_folder  # noqa: E402, F401
from tests.models.memory_transformer.folders import write_folder  # noqa: E402
from tests.models.memory_transformer.references import (  # noqa: E402
    ADAPTERS,
    CASES,
    CHAPTERED,
    columns,
    read_reference,
    strategies_of,
)

EVERY = [*CASES, *((name, strategy) for name in ADAPTERS for strategy in strategies_of(name))]


@pytest.fixture
def make(tmp_path: Path, base_folder: Path) -> Any:  # noqa: F811
    def make(name: str, strategy: str) -> TorchForm:
        folder = write_folder(read_reference(name), tmp_path / f"{name}-{strategy}", strategy, base_folder)
        return TorchForm(open_checkpoint(folder))

    return make


@pytest.mark.parametrize(("name", "strategy"), EVERY)
def test_logits_of_whole_texts_and_of_texts_in_parts(make: Any, name: str, strategy: str) -> None:
    """Texts in parts are a prompt and single tokens, each routed by itself; a form without a cache sees one prompt."""
    form, numbers = make(name, strategy), read_reference(name).numbers
    ids = torch.from_numpy(numbers["input_ids"]).long()
    with torch.no_grad():
        whole = form(ids)
        key = "sequence" if strategy == "hybrid" else strategy
        if strategy != "rolling":  # whose numbers without a cache are those of `sequence`
            np.testing.assert_allclose(columns(whole.numpy()), numbers[f"full.{key}.logits"], atol=1e-4, rtol=0)
        if form.remembers:
            return
        tokens, past, found = ids[:, :8], (), []
        for _ in range(8):
            mask = torch.ones((len(ids), (past[0][0].shape[2] if past else 0) + tokens.shape[1]), dtype=torch.int64)
            logits, past = form.continued(tokens, mask, past)
            tokens = logits[:, -1:].argmax(-1)
            found.append(tokens)
        assert torch.equal(torch.cat(found, dim=1), torch.from_numpy(numbers[f"decode.{strategy}.tokens"]).long())


@pytest.mark.parametrize("strategy", ["sequence", "sequence-rolling", "rolling"])
def test_padding_on_the_left_changes_nothing(make: Any, strategy: str) -> None:
    form = make(CHAPTERED[0], strategy)
    ids = torch.tensor([[40, 109, 238, 220, 102, 246, 19, 49, 157]])
    padded = torch.cat((torch.zeros((1, 4), dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(form.continued(padded, mask, ())[0][:, 4:], form(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_program_holds_the_banks(make: Any, tmp_path: Path) -> None:
    form = make(CHAPTERED[0], "token")
    report = ProgramExporter(form).export(tmp_path / "model.pt2")
    assert report.error <= 1e-5 and report.bytes > report.parameter_bytes
    assert sum(name.startswith("memory_keys") for name, _ in form.named_parameters()) > 0


@pytest.mark.slow
def test_an_onnx_file_with_a_cache_routes_prompts_and_tokens(make: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    form = make(CHAPTERED[1], "sequence-rolling")
    report = ONNXExporter(WithCache(form)).export(tmp_path / "model.onnx", *cache_example(form))
    assert report.error <= 1e-5 and any("past 20" in shape for shape in report.shapes)


def test_a_window_that_no_cache_of_keys_holds_is_refused(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="rolling or hybrid routing"):
        WithCache(make(CHAPTERED[0], "rolling"))


def test_what_dropping_the_memory_loses_is_noted_of_every_format(tmp_path: Path, base_folder: Path) -> None:  # noqa: F811
    folder = write_folder(read_reference(CHAPTERED[0]), tmp_path / "model", "token", base_folder)
    with pytest.warns(UserWarning, match="without its memory the model loses"):
        report = export_model(folder, ["torchscript"], tmp_path / "out", drop_memory=True)["torchscript"]
    assert any(re.search(r"loses \d[\d.e-]* nats a token", note) for note in report.notes)
    assert not [name for name, _ in torch.jit.load(report.path).named_parameters() if "memory_keys" in name]
