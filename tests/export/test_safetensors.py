"""Folders of safetensors: transformers reads them, with the model's logits and the tokenizer's ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from mnemos import InferenceEngine, ModelPackager, export_to_gguf, export_to_safetensors  # noqa: E402
from mnemos.compress.safetensors import convert_folder  # noqa: E402
from mnemos.errors import ConfigError, FormatError, UnsupportedError  # noqa: E402
from mnemos.formats.package import is_package  # noqa: E402
from mnemos.formats.safetensors import open_safetensors  # noqa: E402
from tests.export.gguf_models import TEMPLATE, folder_of, mini_llm_checkpoint, read_config  # noqa: E402

IDS = [5, 300, 77, 12, 600, 41, 3]


def theirs(folder: Path, ids: list[int]) -> np.ndarray:
    """What transformers computes, in the type that the folder names."""
    module = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return module(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_a_gguf_file_becomes_a_folder_for_transformers(name: str, tmp_path: Path) -> None:
    reference = folder_of(name, tmp_path / "model")
    export_to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    report = export_to_safetensors(tmp_path / "model.gguf", tmp_path / "out")
    assert report.path == tmp_path / "out" and report.error < 1e-6 and report.inputs == 6
    stated, original = (read_config(folder) for folder in (report.path, tmp_path / "model"))
    epsilon = "layer_norm_epsilon" if name == "gpt2" else "rms_norm_eps"
    assert stated[epsilon] == original[epsilon]  # though the GGUF file has it in float32
    assert np.allclose(theirs(report.path, IDS), reference.logits(IDS), rtol=1e-5, atol=1e-5)
    tokenizers = (
        hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model"),
        hf.AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    for text in ("Hello world, 12345!", "<|start|>a\n\n b <|end|>[user]", "\u4f60\u597d \U0001f600"):
        first, second = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
        assert first == second
    assert tokenizers[1].chat_template == TEMPLATE
    with InferenceEngine.from_pretrained(report.path, dtype="float32") as engine:
        assert np.allclose(engine.logits(IDS), reference.logits(IDS), atol=1e-4)


def test_quantized_weights_become_float32_or_what_is_asked_for(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    export_to_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    report = export_to_safetensors(tmp_path / "model.gguf", tmp_path / "f32")
    assert report.error < 1e-6 and read_config(report.path)["torch_dtype"] == "float32"
    with InferenceEngine.from_pretrained(tmp_path / "model.gguf", dtype="float32") as engine:
        assert np.allclose(theirs(report.path, IDS), engine.logits(IDS), rtol=1e-5, atol=2e-5)
    half = export_to_safetensors(tmp_path / "model.gguf", tmp_path / "bf16", "bf16")
    assert 0 < half.error < 0.1 and read_config(half.path)["torch_dtype"] == "bfloat16"
    assert {t.type.name for t in open_safetensors(half.path / "model.safetensors").values()} == {"BF16"}


def test_a_folder_keeps_its_files(tmp_path: Path) -> None:
    reference = folder_of("qwen2", tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("free")
    report = export_to_safetensors(tmp_path / "model", tmp_path / "out")
    assert report.error == 0
    assert (report.path / "LICENSE").read_text() == "free"
    assert (report.path / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert np.array_equal(theirs(report.path, IDS), reference.logits(IDS))


def test_a_package_becomes_a_folder_that_is_none(tmp_path: Path) -> None:
    reference = folder_of("llama-tied", tmp_path / "model")
    ModelPackager(tmp_path / "model").package(tmp_path / "package", sbom=True)
    report = export_to_safetensors(tmp_path / "package", tmp_path / "out")
    names = {path.name for path in report.path.iterdir()}
    assert not names & {"metadata.json", "SHA256SUMS", "sbom.cdx.json"} and "tokenizer.json" in names
    assert np.array_equal(theirs(report.path, IDS), reference.logits(IDS))
    assert convert_folder(tmp_path / "package", tmp_path / "half", "bf16").path == tmp_path / "half"
    assert not is_package(tmp_path / "half")


def test_a_module_in_memory(tmp_path: Path) -> None:
    reference = folder_of("qwen3moe", tmp_path / "model")
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    report = export_to_safetensors(reference.module, tmp_path / "out", tokenizer=tokenizer)
    assert report.error < 1e-5
    assert np.allclose(theirs(report.path, IDS), reference.logits(IDS), atol=1e-5)
    assert hf.AutoTokenizer.from_pretrained(report.path)("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]


def test_mini_llm_becomes_a_llama(tmp_path: Path) -> None:
    module = mini_llm_checkpoint(tmp_path / "ckpt.pt")
    report = export_to_safetensors(tmp_path / "ckpt.pt", tmp_path / "out")
    assert read_config(report.path)["architectures"] == ["LlamaForCausalLM"]
    ids = [5, 17, 3, 60, 0, 22, 41]
    with torch.no_grad():
        assert np.allclose(theirs(report.path, ids), module(torch.tensor([ids]))[0][0].numpy(), atol=1e-4)


def test_an_unknown_architecture_is_named_and_no_temporary_folder(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    config = read_config(tmp_path / "model") | {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    expected = re.escape(f"{tmp_path / 'out'}: architecture 'LlavaForConditionalGeneration'")
    with pytest.raises(UnsupportedError, match=f"^{expected}"):
        export_to_safetensors(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("export", "name"), [(export_to_safetensors, "folder"), (export_to_gguf, "model.gguf")])
def test_an_interruption_before_the_comparison_ends_leaves_nothing(
    export: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    folder_of("llama", tmp_path / "model")
    monkeypatch.setattr(f"{export.__module__}.compare_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "model", tmp_path / "out" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_input_is_named(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match="dtype is 'q8_0'; expected one of f32, f16, bf16"):
        export_to_safetensors(tmp_path / "model", tmp_path / "out", "q8_0")
    with pytest.raises(ConfigError, match="model exists; choose another path"):
        export_to_safetensors(tmp_path / "model", tmp_path / "model")
    with pytest.raises(ConfigError, match="is a file; expected the path of a folder"):
        export_to_safetensors(tmp_path / "model", tmp_path / "model" / "config.json")
    with pytest.raises(FormatError, match="cannot be written"):
        export_to_safetensors(tmp_path / "model", tmp_path / "model" / "config.json" / "out")
    export_to_safetensors(tmp_path / "model", tmp_path / "out")
    (tmp_path / "out" / "old").write_text("x")
    export_to_safetensors(tmp_path / "model", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
