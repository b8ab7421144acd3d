"""Memory-augmented models as GGUF files for Mnemos alone, and their bases without memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos import InferenceEngine, export_to_gguf, export_to_safetensors  # noqa: E402
from mnemos.errors import ConfigError, UnsupportedError  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.formats.gguf import GGUFFile  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.models.memory_transformer.conftest import base_folder, make_module, routers  # noqa: E402, F401
from tests.models.memory_transformer.folders import write_folder  # noqa: E402
from tests.models.memory_transformer.references import ADAPTERS, CHAPTERED, PLAIN, read_reference  # noqa: E402

IDS = [3, 9, 1, 7, 5, 2, 8, 4]
pytestmark = pytest.mark.filterwarnings("ignore:.*takes token ids only")


def logits(source: Path) -> np.ndarray:
    with InferenceEngine(load_model(open_checkpoint(source), dtype="float32")) as engine:
        return engine.logits(IDS)


@pytest.mark.parametrize("name", (PLAIN[0], *CHAPTERED, *ADAPTERS))
def test_the_file_is_the_folder_s_model(name: str, base_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = write_folder(read_reference(name), tmp_path / "model", "plain", base_folder)
    report = export_to_gguf(folder, tmp_path / "model.gguf")
    assert report.error == 0 and report.inputs == 6
    assert GGUFFile.open(report.path).metadata["general.architecture"] in ("memory_transformer", "memory_adapter")
    assert np.array_equal(logits(report.path), logits(folder))
    with InferenceEngine.from_pretrained(report.path) as engine:
        assert engine.tokenizer is None and len(engine.generate(IDS, max_new_tokens=4)) > 0
    again = export_to_gguf(report.path, tmp_path / "again.gguf")
    assert again.path.read_bytes() == report.path.read_bytes()


@pytest.mark.parametrize("name", ["03_per_layer_memdim48", "3_qwen2_shared_chapters_perlayer"])
def test_modules_and_other_types(name: str, make_module: Any, tmp_path: Path) -> None:  # noqa: F811
    module = make_module(read_reference(name))
    report = export_to_gguf(module, tmp_path / "model.gguf")
    assert report.error < 1e-5
    with torch.no_grad():
        expected = module(torch.tensor([IDS])).logits[0].numpy()
    assert np.allclose(logits(report.path), expected, atol=1e-4)
    half = export_to_gguf(module, tmp_path / "half.gguf", "bf16")
    assert 0 < half.error < 0.2 and half.bytes < report.bytes


def test_the_documented_call(make_module: Any, tmp_path: Path) -> None:  # noqa: F811
    from mnemos.compat.merge import export_to_gguf as documented

    module = make_module(read_reference("09_chapters_shared_norm"))
    with pytest.warns(UserWarning, match="llama_cpp_path is not needed"):
        report = documented(
            module,
            output_path=str(tmp_path / "outputs" / "model.gguf"),
            quantization_type="q4_k_m",
            llama_cpp_path="/path/to/llama.cpp",
        )
    stored = {tensor.type.name for tensor in GGUFFile.open(report.path).tensors.values()}
    assert stored == {"F32", "Q5_0"} and "Q4_K needs rows of a multiple of 256 values" in report.notes[0]
    assert np.isfinite(logits(report.path)).all()


@pytest.mark.parametrize("name", ["03_per_layer_memdim48", "3_qwen2_shared_chapters_perlayer", "5_qwen2_lora_only"])
def test_without_memory_the_base_is_left_and_the_loss_named(
    name: str,
    base_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = write_folder(read_reference(name), tmp_path / "model", "plain", base_folder)
    with pytest.warns(UserWarning, match=r"without its memory the model loses [\d.e-]+ nats a token, on \d+ tokens"):
        report = export_to_gguf(folder, tmp_path / "base.gguf", drop_memory=True)
    assert any("nats a token" in note for note in report.notes) and report.error <= 1e-6
    assert GGUFFile.open(report.path).metadata["general.architecture"] in ("llama", "qwen2")
    found, full = logits(report.path), logits(folder)
    assert np.isfinite(found).all()
    if name == "5_qwen2_lora_only":  # which has no memory: LoRA stays, merged
        assert np.allclose(found, full, atol=1e-4)
    else:
        assert np.abs(found - full).max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = export_to_safetensors(folder, tmp_path / "base", drop_memory=True)
        assert np.allclose(logits(saved.path), found, atol=1e-5)


def test_bad_input_is_named(base_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = write_folder(read_reference("19_layernorm_gelu_norope_untied"), tmp_path / "model", "plain", base_folder)
    with pytest.raises(UnsupportedError, match="use_rms_norm is False, so that no Llama is left without its memory"):
        export_to_gguf(folder, tmp_path / "base.gguf", drop_memory=True)
    with pytest.raises(UnsupportedError, match="transformers has no class for memory-augmented models"):
        export_to_safetensors(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no memory to drop"):
        export_to_gguf(base_folder, tmp_path / "base.gguf", drop_memory=True)
