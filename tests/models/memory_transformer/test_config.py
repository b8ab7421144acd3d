"""config.yaml of memory-augmented transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

from mnemos.errors import ConfigError, FormatError, UnsupportedError
from mnemos.models.memory_transformer.config import Config, MemorySettings, ModelConfig, load_config

SMALL = "model: {hidden_dim: 64, num_heads: 4, num_layers: 6}\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(text: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path)

    return read


def test_defaults_numbers_and_references(read: Any) -> None:
    config = read("model: {norm_eps: 1e-6, max_seq_len: 64}\nmemory: {num_memory_tokens: '${model.max_seq_len}'}\n")
    assert config.model.norm_eps == 1e-6 and config.model.hidden_dim == 768
    assert config.memory.num_memory_tokens == 64 and config.model.max_position_embeddings == 64
    assert config.mixed_precision == "bf16"
    assert read("training: {mixed_precision: 'no', steps: 3}").mixed_precision == "no"
    assert read("memory: {routing_strategy_inference: sequence_rolling}").memory.routing_strategy_inference == (
        "sequence-rolling"
    )
    assert read("memory: {window_size: 64}").memory.routing_window_size == 64


def test_a_saved_config_is_read_again(read: Any) -> None:
    import yaml

    config = read(SMALL + "memory: {use_chapters: true, num_chapters: 8, top_k_chapters: 2}\n")
    config.model.chat_template = "{{ messages }}"
    assert read(yaml.safe_dump(config.to_dict())).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ({i: 0 for i in range(6)}, 1)),
        ({"memory_layer_placement": "first_k", "memory_layer_k": 9}, ({i: 0 for i in range(6)}, 1)),
        ({"memory_layer_placement": "last_k", "memory_layer_k": 2}, ({4: 0, 5: 0}, 1)),
        ({"memory_layer_placement": "every_n", "memory_sharing": "per_layer"}, ({0: 0, 3: 1}, 2)),
        ({"memory_sharing": "every_k_layers", "memory_sharing_k": 4}, ({i: i // 4 for i in range(6)}, 2)),
        ({"memory_layer_placement": "none"}, ({}, 0)),
        ({"vanilla_mode": True}, ({}, 0)),
        ({"use_memory_adapter": False}, ({}, 0)),
        (
            {"memory_layer_placement": "custom", "memory_layer_indices": [2, 1, 1, 9], "memory_sharing": "per_layer"},
            ({1: 1, 2: 2}, 3),
        ),
    ],
    ids=str,
)
def test_placement_and_banks(settings: dict[str, Any], expected: Any) -> None:
    """The last: a layer that is named twice takes two banks and reads the second, as in published checkpoints."""
    assert MemorySettings(**settings).banks(6) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hidden_size: 4}", "model.hidden_size is unknown; did you mean hidden_dim"),
        ("modle: {}", "'modle' is unknown; did you mean model"),
        ("model: [1]", "model is .1.; it must be a map"),
        ("model: {hidden_dim: 10, num_heads: 4}", "num_heads is 4; it must divide hidden_dim, 10"),
        ("model: {hidden_dim: large}", "model.hidden_dim is 'large'; it must be a whole number"),
        (SMALL + "memory: {memory_num_heads: 3}", "memory_num_heads is 3; it must divide the attention's width, 64"),
        (SMALL + "memory: {memory_num_heads: 4, memory_num_kv_heads: 3}", "must divide the 4 memory heads"),
        ("memory: {use_chapters: true, num_chapters: 7}", "num_chapters is 7; it must divide num_memory_tokens, 1024"),
        ("memory: {use_chapters: true, num_chapters: 8}", "top_k_chapters is 20; it must be at most num_chapters, 8"),
        ("memory: {routing_strategy_train: rolling}", "must be one of sequence, sequence-rolling, token"),
        ("memory: {memory_quant_bits: 5}", "memory_quant_bits is 5; it must be 4 or 8"),
        ("memory: {memory_layer_placement: custom}", "memory_layer_indices is null; placement custom needs a list"),
    ],
)
def test_what_a_config_must_not_say(read: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {a: b", "is not valid YAML"),
        ("3", "holds no map"),
        ("model: &x {dropout: 0.0}\nmemory: *x\n", "alias"),
        ("model: {hidden_dim: '${memory.nothing}'}", "names no field"),
        ("model: {hidden_dim: '${model.num_heads}', num_heads: '${model.hidden_dim}'}", "refers to itself"),
    ],
)
def test_broken_files(read: Any, text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(text)


def test_missing_files_and_other_references(read: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UnsupportedError, match="full name of a field"):
        read("model: {tokenizer_name: '${oc.env:HOME}'}")


def test_attention_shapes() -> None:
    config = Config(
        ModelConfig(hidden_dim=64, num_heads=4, num_kv_heads=2),
        MemorySettings(use_low_rank_memory=True, low_rank_mode="reduced_dim", memory_rank=32),
    )
    assert config.attention_shape(4, 2, 64) == (4, 2, 8) and config.bank_width(64) == 32
    config.memory.memory_num_heads, config.memory.memory_num_kv_heads = 8, 1
    assert config.attention_shape(4, 2, 64) == (8, 1, 4)
