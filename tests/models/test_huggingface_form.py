"""GGUF files converted to folders are the same models: transformers loads the folder and gives the file's logits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from mnemos.errors import UnsupportedError
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.formats.safetensors_writer import Entry as Stored
from mnemos.formats.safetensors_writer import write_safetensors
from mnemos.models.huggingface_form import _llama3, huggingface_form
from mnemos.models.load import load_model
from mnemos.models.rope import Rope
from tests.models.checkpoints import CONFIGS, build, token_ids
from tests.models.stepping import whole

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType

from tests.models.gguf_files import write_gguf

NAMES = (
    "llama", "llama-tied", "llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2",
    "gemma3", "olmo2", "phi3", "phi3-partial", "gpt2", "gpt_neox", "gpt_neox-serial",
)  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama3-own": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 50,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}


def written(path, folder):
    """The file's model in a folder, in the types of the file or float32."""
    config, entries = huggingface_form(open_checkpoint(path))
    tensors = {}
    for name, entry in entries.items():
        tensor = entry.load()
        assert (tensor.name, tensor.type, tensor.shape) == (entry.name, entry.type, entry.shape)
        values = tensor.dequantize()
        tensors[name] = Stored("F32", values.shape, values.reshape(-1).view(np.uint8))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def theirs(folder, ids):
    """What transformers computes; a tensor that it does not know or lacks is an error."""
    module, report = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = {name for name in report["missing_keys"] if "lm_head" not in name and "embed_out" not in name}
    assert not missing and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return module.eval()(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_what_the_source_did(name, tmp_path):
    reference = build(CONFIGS[name](), tmp_path / "source")
    path = write_gguf(reference.module, tmp_path / "model.gguf")
    ids = token_ids(24)
    assert np.allclose(theirs(written(path, tmp_path / "out"), ids), reference.logits(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotations_are_kept(kind, tmp_path):
    config = CONFIGS["llama"]()
    config.rope_parameters = ROPES[kind]
    reference = build(config, tmp_path / "source")
    path = write_gguf(reference.module, tmp_path / "model.gguf")
    ids = token_ids(40)
    assert np.allclose(theirs(written(path, tmp_path / "out"), ids), reference.logits(ids), rtol=1e-4, atol=1e-4)


def test_smollm3_and_long_factors(tmp_path):
    config = hf.SmolLM3Config(
        **(CONFIGS["smollm3"]().to_dict() | {"no_rope_layers": None, "no_rope_layer_interval": 4})
    )
    reference = build(config, tmp_path / "smollm3")
    path = write_gguf(reference.module, tmp_path / "smollm3.gguf")
    ids = token_ids(24)
    assert np.allclose(theirs(written(path, tmp_path / "out"), ids), reference.logits(ids), rtol=1e-5, atol=1e-5)

    config = CONFIGS["phi3"]()
    config.sliding_window, config.original_max_position_embeddings = None, 64
    factors = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.5 * i for i in range(8)]}
    more = {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **more}
    reference = build(config, tmp_path / "phi3")
    path = write_gguf(reference.module, tmp_path / "phi3.gguf")
    found = theirs(written(path, tmp_path / "long"), ids)
    assert np.allclose(found, reference.logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_quantized_rows_are_moved_without_a_change_of_value(name, tmp_path):
    reference = build(CONFIGS[name](), tmp_path / "source")
    path = write_gguf(reference.module, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    model = load_model(open_checkpoint(path), backend="numpy", dtype="float32")
    model.reserve(2)
    ids = token_ids(24)
    expected = whole(model, ids, [0, 1])
    assert np.allclose(theirs(written(path, tmp_path / "out"), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize(
    "factor, low, high, length", [(8.0, 1.0, 4.0, 64), (2.0, 0.5, 1.7, 1000), (32.0, 2.0, 5.0, 4000)]
)
def test_any_scaling_of_llama_3_is_found_in_its_table(head_dim, factor, low, high, length):
    """The table says no more than a line: it is the rotation that must be the same, not each number."""
    original = Rope(10000.0, head_dim, "llama3", factor, length, 4 * length, low, high)
    divisors = replace(original, kind="default").frequencies() / original.frequencies()
    read = Rope(10000.0, head_dim, context_length=4 * length, divisors=tuple(divisors.tolist()))
    found = _llama3(Checkpoint("gguf", Path("model.gguf"), {}, {}), read)
    again = replace(
        original,
        factor=found["factor"],
        low_frequency_factor=found["low_freq_factor"],
        high_frequency_factor=found["high_freq_factor"],
        trained_length=found["original_max_position_embeddings"],
    )
    assert np.allclose(again.frequencies(), original.frequencies(), rtol=1e-5, atol=0)


def test_a_table_of_frequencies_that_no_config_can_say_is_refused(tmp_path):
    divisors = (1.0, 1.0, 3.0, 1.5, 4.0, 2.0, 4.0, 4.0)  # neither a ramp nor its ends
    with pytest.raises(UnsupportedError, match=r"'rope_freqs.weight' holds no scaling of Llama 3"):
        _llama3(Checkpoint("gguf", tmp_path, {}, {}), Rope(10000.0, 16, divisors=divisors))


def test_special_tokens_are_named(tmp_path):
    path = write_gguf(build(CONFIGS["llama"](), tmp_path / "source").module, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(path)
    more = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 0}
    config, _ = huggingface_form(Checkpoint("gguf", path, {**checkpoint.metadata, **more}, checkpoint.tensors))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
