"""Wrong hyperparameters and tensors are refused by name before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.errors import ConfigError, FormatError, MnemosError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.load import describe_model, load_model
from mnemos.models.registry import ARCHITECTURES
from tests.models.checkpoints import CONFIGS, Reference
from tests.models.gguf_files import write_gguf

WRONG_VALUES = (0, -1, 1.5, True, "many", [], {}, 10**15, float("nan"), float("inf"), [1, 2])
Sources = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def folder(reference: Callable[[str], Reference]) -> Sources:
    return lambda name: open_checkpoint(reference(name).folder)


@pytest.fixture(scope="module")
def gguf(reference: Callable[[str], Reference], tmp_path_factory: pytest.TempPathFactory) -> Sources:
    def source(name: str) -> Checkpoint:
        path: Path = tmp_path_factory.mktemp(name) / "model.gguf"
        return open_checkpoint(write_gguf(reference(name).module, path))

    return source


def with_field(checkpoint: Checkpoint, key: str, value: Any) -> Checkpoint:
    return replace(checkpoint, metadata={**checkpoint.metadata, key: value})


def without_field(checkpoint: Checkpoint, key: str) -> Checkpoint:
    return replace(checkpoint, metadata={k: v for k, v in checkpoint.metadata.items() if k != key})


def with_tensor(checkpoint: Checkpoint, name: str, tensor: Tensor | None) -> Checkpoint:
    others = {k: v for k, v in checkpoint.tensors.items() if k != name}
    return replace(checkpoint, tensors=others if tensor is None else {**others, name: tensor})


SIZES = {
    "llama": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen3moe": ("num_experts_per_tok", "moe_intermediate_size"),
    "gemma3": ("hidden_size", "intermediate_size", "num_hidden_layers"),
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SIZES.items() for field in fields])
def test_sizes_of_a_config(name: str, field: str, folder: Sources) -> None:
    checkpoint = folder(name)
    for value in WRONG_VALUES:
        with pytest.raises(FormatError, match=f"field '{field}' is .*expected an integer"):
            describe_model(with_field(checkpoint, field, value))
    with pytest.raises(FormatError, match=f"field '{field}' is absent; expected an integer"):
        describe_model(without_field(checkpoint, field))


@pytest.mark.parametrize(
    "field",
    ["embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length"],
)
def test_sizes_of_a_gguf_file(field: str, gguf: Sources) -> None:
    checkpoint, key = gguf("llama"), f"llama.{field}"
    for value in WRONG_VALUES:
        with pytest.raises(FormatError, match=f"model.gguf: field '{key}' is .*expected an integer"):
            describe_model(with_field(checkpoint, key, value))
    with pytest.raises(FormatError, match=f"field '{key}' is absent"):
        describe_model(without_field(checkpoint, key))


@pytest.mark.parametrize(
    ("name", "field", "value", "rule"),
    [
        ("llama", "num_key_value_heads", 3, "a divisor of the 4 attention heads"),
        ("llama", "rms_norm_eps", 0, "a number above 0"),
        ("llama", "rms_norm_eps", float("nan"), "a number above 0"),
        ("llama", "hidden_act", "mish", "one of gelu"),
        ("llama", "tie_word_embeddings", "no", "true or false"),
        ("llama", "attention_bias", 1, "true or false"),
        ("mistral", "sliding_window", -4, "an integer from 0"),
        ("qwen2-window", "layer_types", ["full_attention"], "a list of 3 names"),
        (
            "qwen2-window",
            "layer_types",
            ["full_attention", "x", "y"],
            "a list of 3 names out of full_attention, sliding_attention",
        ),
        ("mixtral", "num_experts_per_tok", 5, "an integer from 1 to 4"),
        ("qwen3moe-mixed", "mlp_only_layers", [-1], "a list of integers"),
        ("smollm3", "no_rope_layers", [1, 0], "a list of 4 integers"),
        ("gemma2", "query_pre_attn_scalar", 0, "a number above 0"),
        ("gemma2", "attn_logit_softcapping", -1.0, "a number above 0"),
        ("gpt2", "layer_norm_epsilon", -1e-5, "a number above 0"),
    ],
)
def test_other_fields(name: str, field: str, value: Any, rule: str, folder: Sources) -> None:
    with pytest.raises(FormatError, match=f"field '{field}' is .*expected {rule}"):
        describe_model(with_field(folder(name), field, value))


def test_heads_must_divide_the_hidden_size(folder: Sources) -> None:
    checkpoint = without_field(with_field(folder("llama"), "num_attention_heads", 6), "head_dim")
    with pytest.raises(FormatError, match="field 'num_attention_heads' is 6; expected a divisor of the hidden size 64"):
        describe_model(checkpoint)


def test_heads_of_absurd_width_are_refused_before_a_table_is_made_of_them(folder: Sources) -> None:
    checkpoint = with_field(folder("qwen2"), "head_dim", 2**30)
    with pytest.raises(FormatError, match="field 'head_dim' is 1073741824; expected an integer from 1 to 65536"):
        describe_model(checkpoint)
    wide = without_field(with_field(folder("qwen2"), "hidden_size", 2**30), "head_dim")
    with pytest.raises(FormatError, match="expected heads of at most 65536 elements"):
        describe_model(wide)


@pytest.mark.parametrize("name", CONFIGS)
def test_any_field_changed_gives_a_model_or_a_named_error(name: str, folder: Sources) -> None:
    checkpoint = folder(name)
    for field in checkpoint.metadata:
        for value in WRONG_VALUES:
            try:
                describe_model(with_field(checkpoint, field, value))
            except MnemosError as error:
                assert str(error)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "mixtral", "gpt2"])
def test_any_gguf_field_changed_gives_a_model_or_a_named_error(name: str, gguf: Sources) -> None:
    checkpoint = gguf(name)
    for field in [key for key in checkpoint.metadata if not key.startswith("GGUF")]:
        for value in WRONG_VALUES:
            try:
                describe_model(with_field(checkpoint, field, value))
            except MnemosError as error:
                assert str(error)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_needed_and_has_one_shape(name: str, folder: Sources) -> None:
    checkpoint = folder(name)
    for key, tensor in checkpoint.tensors.items():
        with pytest.raises(FormatError, match=r"tensor '.*' is missing; expected one with shape"):
            describe_model(with_tensor(checkpoint, key, None))
        longer = Tensor(key, tensor.type, (tensor.shape[0] + 1, *tensor.shape[1:]), tensor.data)
        with pytest.raises(FormatError, match=r"has shape .*; the config requires"):
            describe_model(with_tensor(checkpoint, key, longer))


def test_tensors_without_a_place(folder: Sources) -> None:
    checkpoint = folder("llama")
    extra = Tensor.from_array("x", np.zeros((2, 2), np.float32))
    for key in ("model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.bias"):
        with pytest.raises(FormatError, match=f"tensor '{key}' has no place"):
            describe_model(with_tensor(checkpoint, key, extra))
    bare = replace(checkpoint, tensors={k.removeprefix("model."): tensor for k, tensor in checkpoint.tensors.items()})
    with pytest.raises(FormatError, match="tensor 'adapter.weight' has no place"):
        describe_model(with_tensor(bare, "adapter.weight", extra))
    fewer = with_field(checkpoint, "num_hidden_layers", 2)
    with pytest.raises(FormatError, match=r"tensor 'model.layers.2.* \(and 8 more\) has no place"):
        describe_model(fewer)


def test_tensors_beside_the_model_are_left_out_with_a_warning(folder: Sources) -> None:
    checkpoint = folder("llama")
    extra = Tensor.from_array("x", np.zeros((2, 2), np.float32))
    with pytest.warns(UserWarning, match="tensor 'v_head.summary.weight' is not in the model and is left out"):
        spec = describe_model(with_tensor(checkpoint, "v_head.summary.weight", extra))
    assert spec.vocabulary_size == describe_model(checkpoint).vocabulary_size


def test_harmless_tensors_are_ignored(folder: Sources) -> None:
    extra = Tensor.from_array("x", np.zeros(8, np.float32))
    describe_model(with_tensor(folder("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq", extra))
    describe_model(with_tensor(folder("gpt2"), "transformer.h.0.attn.bias", extra))
    describe_model(with_tensor(folder("gpt_neox"), "gpt_neox.layers.0.attention.masked_bias", extra))
    describe_model(with_tensor(folder("llama-tied"), "lm_head.weight", extra))


def test_integer_weights_are_refused(folder: Sources) -> None:
    checkpoint = folder("llama")
    tensor = Tensor("x", TensorType.I8, (64,), np.zeros(64, np.uint8))
    with pytest.raises(FormatError, match=r"'model.norm.weight' is of type I8; expected floating point or quantized"):
        describe_model(with_tensor(checkpoint, "model.norm.weight", tensor))


def test_unknown_architectures(folder: Sources) -> None:
    checkpoint = folder("llama")
    strange = with_field(with_field(checkpoint, "architectures", ["MambaForCausalLM"]), "model_type", "mamba")
    with pytest.raises(UnsupportedError, match=r"'MambaForCausalLM' / 'mamba' is not supported; supported are .*llama"):
        describe_model(strange)
    with pytest.raises(FormatError, match="architectures or model_type is absent"):
        describe_model(without_field(without_field(checkpoint, "architectures"), "model_type"))
    with pytest.raises(UnsupportedError) as caught:
        describe_model(strange)
    for names in ARCHITECTURES.values():
        assert all(name in str(caught.value) for name in names)


def test_model_type_is_enough(folder: Sources) -> None:
    assert describe_model(without_field(folder("qwen3"), "architectures")).architecture == "qwen3"
    assert describe_model(with_field(folder("qwen3"), "architectures", ["MyQwen"])).architecture == "qwen3"


@pytest.mark.parametrize("option", [{"dtype": "float64"}, {"kv_dtype": "int4"}, {"context_length": 257}])
def test_bad_options(option: dict[str, Any], folder: Sources) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        load_model(folder("llama"), backend="numpy", **option)


def test_a_model_is_used_in_order(folder: Sources) -> None:
    model = load_model(folder("llama"), backend="numpy")
    with pytest.raises(ConfigError, match="call reserve"):
        _ = model.cache
    with pytest.raises(ConfigError, match="pages is 0"):
        model.reserve(0)
