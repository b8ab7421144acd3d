"""A GGUF file and a Hugging Face folder with the same weights are the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.models.load import load_model
from tests.models.checkpoints import CONFIGS, Reference, token_ids
from tests.models.conftest import open_model
from tests.models.gguf_files import write_gguf
from tests.models.stepping import whole

# What the format cannot express: an odd query scale, unnormalised experts, a window from some layer on, biases.
NOT_IN_GGUF = {
    "gemma2-scalar", "qwen3moe-mixed", "qwen2-window", "qwen3-biases", "olmo2-biases", "smollm3", "gpt2-scaled",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_IN_GGUF])
def test_same_logits(name: str, backend: str, reference: Callable[[str], Reference], tmp_path: Path) -> None:
    path = write_gguf(reference(name).module, tmp_path / "model.gguf")
    ids = token_ids(40)
    np.testing.assert_allclose(whole(open_model(path, backend), ids, [4, 0]), reference(name).logits(ids), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3moe"])
def test_quantized_rows_and_slices(
    name: str, backend: str, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    """Rows are reordered, fused matrices cut and experts separated in their storage form, without a change of value."""
    path = write_gguf(reference(name).module, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(path)
    assert {"Q8_0", "F32"} == {tensor.type.name for tensor in checkpoint.tensors.values()}
    expanded = {key: Tensor.from_array(key, tensor.dequantize()) for key, tensor in checkpoint.tensors.items()}
    found = []
    for source in (checkpoint, replace(checkpoint, tensors=expanded)):
        model = load_model(source, backend=backend, dtype="float32")
        model.reserve(2)
        found.append(whole(model, token_ids(40), [1, 0]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_same_specification(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    path = write_gguf(reference("llama").module, tmp_path / "model.gguf")
    from_gguf, from_folder = (
        load_model(open_checkpoint(p), backend="numpy").spec for p in (path, reference("llama").folder)
    )
    for name in (
        "architecture",
        "vocabulary_size",
        "context_length",
        "hidden_size",
        "layout",
        "eos_token_ids",
        "parameters",
    ):
        assert getattr(from_gguf, name) == getattr(from_folder, name), name
    assert from_gguf.fingerprint != from_folder.fingerprint


def test_smollm3_skips_every_fourth_rotation(backend: str, tmp_path: Path) -> None:
    import transformers as hf

    from tests.models.checkpoints import build

    config = CONFIGS["smollm3"]().to_dict() | {"no_rope_layers": None, "no_rope_layer_interval": 4}
    model = build(hf.SmolLM3Config(**config), tmp_path / "folder")
    path = write_gguf(model.module, tmp_path / "model.gguf")
    ids = token_ids(40)
    np.testing.assert_allclose(whole(open_model(path, backend), ids, [4, 0]), model.logits(ids), atol=1e-4)


def test_a_value_for_each_layer_counts_as_one_where_all_are_equal(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_gguf(reference("llama").module, tmp_path / "model.gguf"))
    keys = ("llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length")
    arrays = {key: np.full(3, checkpoint.metadata[key], np.int32) for key in keys}
    arrays["llama.attention.layer_norm_rms_epsilon"] = np.full(3, 1e-6, np.float32)
    model = load_model(replace(checkpoint, metadata=checkpoint.metadata | arrays), backend="numpy", dtype="float32")
    model.reserve(2)
    np.testing.assert_allclose(whole(model, token_ids(40), [1, 0]), reference("llama").logits(token_ids(40)), atol=1e-4)


def test_a_pattern_of_booleans_says_which_layers_slide(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(reference("gemma3").module, tmp_path / "model.gguf"))
    pattern = [True, False, True, True, False, False]
    stated = {**checkpoint.metadata, "gemma3.attention.sliding_window_pattern": np.array(pattern)}
    config = load_model(replace(checkpoint, metadata=stated), backend="numpy").architecture.config
    assert config.windows == (6, 0, 6, 6, 0, 0)
