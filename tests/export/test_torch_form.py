"""Built-in architectures as traceable modules: the same logits as transformers' models, with and without a cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.export.onnx import ONNXExporter  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.torch_form import TorchForm, WithCache, cache_example  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.models.checkpoints import CONFIGS, Reference, build, token_ids  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(name: str) -> tuple[TorchForm, Reference]:
        reference = build(CONFIGS[name](), tmp_path_factory.mktemp(name))
        return TorchForm(open_checkpoint(reference.folder)), reference

    return make


def ids(*shape: int) -> Any:
    return torch.tensor(token_ids(int(np.prod(shape)))).reshape(shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_logits_are_those_of_the_reference(name: str, made: Any) -> None:
    form, reference = made(name)
    given = ids(2, 9)
    with torch.no_grad():
        expected = reference.module(given).logits
        torch.testing.assert_close(form(given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_in_parts_with_padding_on_the_left_gives_the_same(name: str, made: Any) -> None:
    form, _ = made(name)
    given = ids(1, 11)
    with torch.no_grad():
        whole = form(given)
        padded = torch.cat((torch.zeros((1, 3), dtype=torch.int64), given), dim=1)
        mask = torch.cat((torch.zeros((1, 3), dtype=torch.int64), torch.ones_like(given)), dim=1)
        first, past = form.continued(padded[:, :8], mask[:, :8], ())
        second, _ = form.continued(padded[:, 8:], mask, past)
    torch.testing.assert_close(torch.cat((first[:, 3:], second), dim=1), whole, atol=2e-5, rtol=1e-4)


def test_tied_weights_are_one_parameter(made: Any) -> None:
    form, _ = made("llama")
    sizes = [tuple(parameter.shape) for parameter in form.parameters()]
    vocabulary = form.spec.vocabulary_size
    assert sizes.count((vocabulary, form.spec.hidden_size)) == (1 if form.spec.tied_embeddings else 2)


def test_it_is_exported_without_and_with_its_cache(made: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    form, _ = made("llama")
    assert ProgramExporter(form).export(tmp_path / "model.pt2", ids(1, 4)).error <= 1e-5
    exporter = ONNXExporter(WithCache(form))
    report = exporter.export(tmp_path / "model.onnx", *cache_example(form))
    assert report.error <= 1e-5 and any("past 0" in shape for shape in report.shapes)
    session = exporter.load_onnx(tmp_path / "model.onnx")
    given = ids(1, 7)
    fed = {"input_ids": given.numpy(), "attention_mask": np.ones((1, 7), np.int64)}
    empty = np.zeros((1, form.kv_heads, 0, form.head_dim), np.float32)
    names = [entry.name for entry in session.get_inputs()][2:]
    outputs = session.run(None, {**fed, **dict.fromkeys(names, empty)})
    with torch.no_grad():
        np.testing.assert_allclose(outputs[0], form(given).numpy(), atol=1e-4)
    presents = [entry.name for entry in session.get_outputs()][1:]
    assert presents == [name.replace("past_key_values", "present") for name in names]
