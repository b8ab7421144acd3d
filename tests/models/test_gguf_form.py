"""Checkpoints converted to GGUF are the same models: their logits are equal, and the files say all that matters."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from mnemos.errors import UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.gguf_writer import encode_value, writing_gguf
from mnemos.formats.tensor import Tensor
from mnemos.models.gguf_form import gguf_form
from mnemos.models.load import load_model
from tests.models.checkpoints import CONFIGS, VOCABULARY, build, token_ids
from tests.models.foreign.mini_llm import make_transformer
from tests.models.stepping import whole

CONVERTED = {
    "llama": "llama", "llama-tied": "llama", "llama-biases": "llama", "mistral": "llama", "mixtral": "llama",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3": "gemma3", "olmo2": "olmo2", "phi3": "phi3", "phi3-partial": "phi3", "gpt2": "gpt2",
    "gpt_neox": "gptneox", "gpt_neox-serial": "gptneox",
}  # fmt: skip
REFUSED = {
    "qwen2-window": "windows is",
    "gemma2-scalar": "query_pre_attn_scalar is",
    "smollm3": "another rotary embedding in layer 1",
    "gpt2-scaled": "scale_attn_by_inverse_layer_idx is True",
    "qwen3moe-mixed": "cannot hold it: tensor 'blk.0.ffn_gate_exps.weight' is missing",
    "olmo2-biases": r"cannot hold it: tensor 'blk.0.attn_k.bias' \(and .* more\) has no place",
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "yarn-own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
}


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch):
    """These models have none; tests/text/test_gguf_form.py converts tokenizers."""
    monkeypatch.setattr(
        "mnemos.models.gguf_form.tokenizer_metadata", lambda folder, size: {"tokenizer.ggml.model": "none"}
    )


def logits(path, ids):
    model = load_model(open_checkpoint(path), backend="numpy", dtype="float32")
    model.reserve(2)
    return whole(model, ids, [0, 1])


def converted(folder, tmp_path):
    """The folder's model, as a file of its converted form."""
    metadata, entries = gguf_form(open_checkpoint(folder))
    path = tmp_path / "model.gguf"
    with writing_gguf(path, metadata, [(e.name, e.shape) for e in entries.values()]) as writer:
        for entry in entries.values():
            tensor = entry.load()
            assert (tensor.name, tensor.type, tensor.shape) == (entry.name, entry.type, entry.shape)
            writer.write(entry.name, entry.type, [tensor.data])
    return path


@pytest.mark.parametrize("name", CONVERTED)
def test_tensors_are_those_of_llama_cpp_s_converter(name, tmp_path):
    pytest.importorskip("gguf")
    from tests.models.gguf_files import write_gguf

    module = build(CONFIGS[name](), tmp_path).module
    theirs = open_checkpoint(write_gguf(module, tmp_path / "reference.gguf")).tensors
    _, entries = gguf_form(open_checkpoint(tmp_path / "model.safetensors"))
    assert entries.keys() == theirs.keys()
    for key, entry in entries.items():
        assert np.array_equal(entry.load().dequantize(), theirs[key].dequantize()), key


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_are_those_of_the_checkpoint(name, tmp_path):
    folder = tmp_path / "model"
    build(CONFIGS[name](), folder)
    path = converted(folder, tmp_path)
    assert open_checkpoint(path).metadata["general.architecture"] == CONVERTED[name]
    ids = token_ids(24)
    assert np.allclose(logits(path, ids), logits(folder, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotations_are_kept(kind, tmp_path):
    folder = tmp_path / "model"
    config = CONFIGS["llama"]()
    config.rope_parameters = ROPES[kind]
    build(config, folder)
    ids = token_ids(40)
    assert np.allclose(logits(converted(folder, tmp_path), ids), logits(folder, ids), rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_is_left_out_within_the_trained_length(tmp_path):
    folder = tmp_path / "model"
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    build(config, folder)
    with pytest.warns(UserWarning, match="no dynamic scaling .* up to 256 tokens, within which nothing is scaled"):
        path = converted(folder, tmp_path)
    ids = token_ids(40)
    assert np.allclose(logits(path, ids), logits(folder, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["olmo2", "gpt_neox"])
def test_a_tied_head_is_written_again_where_llama_cpp_needs_one(name, tmp_path):
    folder = tmp_path / "model"
    config = CONFIGS[name]()
    config.tie_word_embeddings = True
    build(config, folder)
    path = converted(folder, tmp_path)
    assert "output.weight" in open_checkpoint(path).tensors
    ids = token_ids(24)
    assert np.allclose(logits(path, ids), logits(folder, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_may_be_separate_or_in_one_tensor(name, tmp_path):
    folder = tmp_path / "model"
    module = build(CONFIGS[name](), folder).module
    checkpoint = open_checkpoint(folder)
    assert any(".experts.0." in key for key in checkpoint.tensors)
    fused = {key: Tensor.from_array(key, values.numpy()) for key, values in module.state_dict().items()}
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in fused)
    separate, together = (gguf_form(replace(checkpoint, tensors=t))[1] for t in (checkpoint.tensors, fused))
    assert separate.keys() == together.keys()
    for key, entry in separate.items():
        assert np.array_equal(entry.load().dequantize(), together[key].load().dequantize()), key


def test_mini_llm_is_a_llama_without_another_order(tmp_path):
    module = make_transformer()
    torch.save({"model_args": asdict(module.args), "model": module.state_dict()}, tmp_path / "ckpt.pt")
    path = converted(tmp_path / "ckpt.pt", tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["general.architecture"] == "llama"
    weight = module.state_dict()["layers.0.attention.wq.weight"].numpy()
    assert np.array_equal(checkpoint.tensors["blk.0.attn_q.weight"].dequantize(), weight)
    ids = [token % 61 for token in token_ids(10)]
    assert np.allclose(logits(path, ids), logits(tmp_path / "ckpt.pt", ids), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_nano_gpt_is_a_gpt2_with_the_exact_gelu(bias, tmp_path):
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "wte": (VOCABULARY, 32), "wpe": (16, 32), "ln_f": (32,), "h.0.ln_1": (32,), "h.0.ln_2": (32,),
        "h.0.attn.c_attn": (96, 32), "h.0.attn.c_proj": (32, 32), "h.0.mlp.c_fc": (128, 32),
        "h.0.mlp.c_proj": (32, 128),
    }  # fmt: skip
    state = {f"transformer.{n}.weight": torch.randn(s, generator=generator) * 0.3 for n, s in shapes.items()}
    if bias:
        for name, shape in shapes.items():
            if name not in ("wte", "wpe"):
                state[f"transformer.{name}.bias"] = torch.randn(shape[0], generator=generator)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": VOCABULARY, "bias": bias}
    torch.save({"model": state, "model_args": sizes}, tmp_path / "ckpt.pt")
    path = converted(tmp_path / "ckpt.pt", tmp_path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["general.architecture"] == "gpt2"
    assert checkpoint.metadata["gpt2.hidden_activation"] == "gelu"
    assert checkpoint.tensors["blk.0.attn_qkv.bias"].dequantize().any() == bias
    ids = token_ids(10)
    assert np.allclose(logits(path, ids), logits(tmp_path / "ckpt.pt", ids), atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_say_is_refused(name, tmp_path):
    build(CONFIGS[name](), tmp_path)
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        gguf_form(open_checkpoint(tmp_path))


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_ignores_is_named(name, tmp_path):
    build(CONFIGS[name](), tmp_path)
    with pytest.warns(UserWarning, match=r"reaches back [79] tokens, which llama.cpp does not limit in (llama|phi3)"):
        gguf_form(open_checkpoint(tmp_path))


def test_parts_for_images_are_named_where_they_are_left_out(tmp_path):
    build(CONFIGS["gemma3"](), tmp_path)
    found = open_checkpoint(tmp_path)
    _, plain = gguf_form(found)
    image = Tensor.from_array("x", np.zeros((2, 2), np.float32))
    whole = replace(found, tensors={**found.tensors, "vision_tower.a.weight": image, "multi_modal_projector.w": image})
    with pytest.warns(UserWarning, match="has 2 tensors of parts for other inputs than text, such as 'vision_tower"):
        _, entries = gguf_form(whole)
    assert entries.keys() == plain.keys()


def test_values_have_the_types_that_llama_cpp_expects(tmp_path):
    build(CONFIGS["qwen3"](), tmp_path)
    metadata, entries = gguf_form(open_checkpoint(tmp_path))
    types = {key: int.from_bytes(encode_value(key, value)[:4], "little") for key, value in metadata.items()}
    assert types["qwen3.block_count"] == types["qwen3.attention.key_length"] == 4  # uint32
    assert types["qwen3.rope.freq_base"] == types["qwen3.attention.layer_norm_rms_epsilon"] == 6  # float32
    assert all(entry.type.name == "F32" for entry in entries.values() if len(entry.shape) == 1)
