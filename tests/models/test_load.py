"""Checkpoints in their other spellings, and the properties of a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mnemos.errors import CapacityError
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.models.load import describe_model, load_model
from tests.models.checkpoints import Reference, token_ids
from tests.models.conftest import HAS_NATIVE
from tests.models.stepping import whole

ReferenceFunction = Callable[[str], Reference]
IDS = token_ids(40)


@pytest.fixture
def same(reference: ReferenceFunction) -> Callable[[str, Checkpoint], None]:
    def check(name: str, checkpoint: Checkpoint) -> None:
        model = load_model(checkpoint, backend="numpy", dtype="float32")
        model.reserve(2)
        np.testing.assert_allclose(whole(model, IDS, [1, 0]), reference(name).logits(IDS), atol=1e-4)

    return check


def renamed(checkpoint: Checkpoint, rename: Callable[[str], str]) -> Checkpoint:
    return replace(checkpoint, tensors={rename(name): tensor for name, tensor in checkpoint.tensors.items()})


def test_gemma3_as_older_versions_wrote_it(reference: ReferenceFunction, same: Any) -> None:
    checkpoint = open_checkpoint(reference("gemma3").folder)
    old = {k: v for k, v in checkpoint.metadata.items() if k not in ("rope_parameters", "layer_types")}
    old |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    same("gemma3", replace(checkpoint, metadata=old))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_within_a_multimodal_checkpoint(prefix: str, reference: ReferenceFunction, same: Any) -> None:
    checkpoint = open_checkpoint(reference("gemma3").folder)
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": checkpoint.metadata,
    }
    moved = renamed(checkpoint, lambda name: prefix + name.removeprefix("model."))
    vision = Tensor.from_array("x", np.zeros((2, 2), np.float32))
    tensors = {**moved.tensors, "vision_tower.encoder.weight": vision, "multi_modal_projector.weight": vision}
    same("gemma3", replace(checkpoint, metadata=outer, tensors=tensors))


def test_what_gemma2_leaves_out_and_what_it_switches_off(reference: ReferenceFunction) -> None:
    checkpoint = open_checkpoint(reference("gemma2").folder)
    names = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    rest = {k: v for k, v in checkpoint.metadata.items() if k not in names}
    for metadata, expected in ((rest, (50.0, 30.0, 4096)), (rest | dict.fromkeys(names), (0.0, 0.0, 0))):
        model = load_model(replace(checkpoint, metadata=metadata), backend="numpy")
        config: Any = model.architecture.config
        assert (config.attn_logit_softcapping, config.final_logit_softcapping, config.windows[0]) == expected


def test_gpt_neox_as_older_versions_wrote_it(reference: ReferenceFunction, same: Any) -> None:
    checkpoint = open_checkpoint(reference("gpt_neox").folder)
    old = {k: v for k, v in checkpoint.metadata.items() if k not in ("rope_parameters", "num_key_value_heads")}
    same("gpt_neox", replace(checkpoint, metadata=old | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))


def test_gpt2_without_a_prefix(reference: ReferenceFunction, same: Any) -> None:
    checkpoint = open_checkpoint(reference("gpt2").folder)
    same("gpt2", renamed(checkpoint, lambda name: name.removeprefix("transformer.")))


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_fused_experts(name: str, reference: ReferenceFunction, same: Any) -> None:
    """As in transformers 5's memory, with an axis for the expert."""
    checkpoint = open_checkpoint(reference(name).folder)
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if ".experts." not in key}
    tensors = {key.replace("block_sparse_moe", "mlp"): tensor for key, tensor in tensors.items()}
    for key, parameter in reference(name).module.state_dict().items():
        if ".experts." in key:
            tensors[key] = Tensor.from_array(key, parameter.numpy())
    same(name, replace(checkpoint, tensors=tensors))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_stored_projection_counts_where_it_differs_from_a_tied_embedding(
    name: str, reference: ReferenceFunction, same: Any
) -> None:
    checkpoint = open_checkpoint(reference(name).folder)
    embedding = next(t for key, t in checkpoint.tensors.items() if key.endswith(("embed_tokens.weight", "wte.weight")))
    copied = replace(checkpoint, tensors={**checkpoint.tensors, "lm_head.weight": embedding})
    same(name, copied)
    doubled = Tensor.from_array("lm_head.weight", 2 * embedding.dequantize())
    model = load_model(replace(checkpoint, tensors={**checkpoint.tensors, "lm_head.weight": doubled}), backend="numpy")
    model.reserve(2)
    np.testing.assert_allclose(whole(model, IDS, [1, 0]), 2 * reference(name).logits(IDS), atol=1e-2)


@pytest.mark.parametrize("kind", [TensorType.F16, TensorType.BF16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_half_precision_files(name: str, kind: TensorType, reference: ReferenceFunction) -> None:
    """Weights of 16 bits mean the values that they are expanded to, transposed and offset ones too."""
    checkpoint = open_checkpoint(reference(name).folder)
    half = {key: _as_half(tensor, kind) for key, tensor in checkpoint.tensors.items()}
    full = {key: Tensor.from_array(key, tensor.dequantize()) for key, tensor in half.items()}
    found = []
    for tensors in (half, full):
        model = load_model(replace(checkpoint, tensors=tensors), backend="numpy", dtype="float32")
        model.reserve(2)
        found.append(whole(model, IDS, [1, 0]))
    np.testing.assert_array_equal(found[0], found[1])


def _as_half(tensor: Tensor, kind: TensorType) -> Tensor:
    values = tensor.dequantize().reshape(-1)
    data = values.astype(np.float16) if kind is TensorType.F16 else (values.view(np.uint32) >> 16).astype(np.uint16)
    return Tensor(tensor.name, kind, tensor.shape, data.view(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "expected"),
    [
        ("auto", "auto", "float16"),
        ("float32", "auto", "float32"),
        ("float32", "int8", "int8"),
        ("auto", "bfloat16", "bfloat16"),
    ],
)
def test_cache_type(dtype: str, kv_dtype: str, expected: str, reference: ReferenceFunction) -> None:
    checkpoint = open_checkpoint(reference("llama").folder)
    assert describe_model(checkpoint, dtype=dtype, kv_dtype=kv_dtype).layout.dtype == expected


def test_windows(reference: ReferenceFunction) -> None:
    windows = {
        name: describe_model(open_checkpoint(reference(name).folder)).window
        for name in ("llama", "mistral", "gemma2", "gemma3", "qwen2-window", "phi3")
    }
    assert windows == {"llama": 0, "mistral": 7, "gemma2": 0, "gemma3": 0, "qwen2-window": 0, "phi3": 9}


def test_layers_with_equal_windows_are_a_group(reference: ReferenceFunction) -> None:
    groups = describe_model(open_checkpoint(reference("gemma3").folder)).layout.groups
    assert [(group.window, group.layers) for group in groups] == [(0, (5,)), (6, (0, 1, 2, 3, 4))]
    short = describe_model(open_checkpoint(reference("gemma3").folder), context_length=6).layout
    assert [group.window for group in short.groups] == [0]  # the window reaches every position


def test_fingerprint(reference: ReferenceFunction) -> None:
    checkpoint = open_checkpoint(reference("llama").folder)

    def fingerprint(source: Checkpoint, **options: Any) -> str:
        return load_model(source, backend="numpy", **options).spec.fingerprint

    base = fingerprint(checkpoint)
    assert fingerprint(open_checkpoint(reference("llama").folder)) == base
    key = "model.layers.1.mlp.up_proj.weight"
    noise = Tensor.from_array(key, checkpoint.tensors[key].dequantize() + np.float32(1e-3))
    others = [
        fingerprint(checkpoint, dtype="float32"),
        fingerprint(checkpoint, kv_dtype="int8"),
        fingerprint(replace(checkpoint, metadata={**checkpoint.metadata, "rms_norm_eps": 1e-3})),
        fingerprint(replace(checkpoint, tensors={**checkpoint.tensors, key: noise})),
        fingerprint(open_checkpoint(reference("llama-tied").folder)),
    ]
    assert len({base, *others}) == 6


def test_special_tokens(reference: ReferenceFunction) -> None:
    checkpoint = open_checkpoint(reference("llama").folder)
    plain = replace(checkpoint, generation_config={})
    spec = describe_model(plain)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2,), 0)
    several = replace(checkpoint, generation_config={"eos_token_id": [2, 130, 131, 2]})
    assert describe_model(several).eos_token_ids == (2, 130)
    none = replace(plain, metadata={**plain.metadata, "eos_token_id": None, "bos_token_id": None, "pad_token_id": -1})
    spec = describe_model(none)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (None, (), None)


def test_details(reference: ReferenceFunction) -> None:
    """A model's name and license are those that its file gives, or the file's own name and none."""
    checkpoint = open_checkpoint(reference("llama-tied").folder)
    folder = reference("llama-tied").folder.name
    assert describe_model(checkpoint).details == {"name": folder, "license": None}
    named = {**checkpoint.metadata, "_name_or_path": "org/small", "license": "mit"}
    assert describe_model(replace(checkpoint, metadata=named)).details == {"name": "org/small", "license": "mit"}


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
def test_too_little_memory(reference: ReferenceFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemos import _native

    checkpoint = open_checkpoint(reference("llama").folder)
    needed = 4 * describe_model(checkpoint).parameters
    monkeypatch.setattr(_native, "available_memory", lambda: needed)
    load_model(checkpoint, backend="native", dtype="float32")
    monkeypatch.setattr(_native, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="as float32 needs .* MB of memory and 0 MB are available"):
        load_model(checkpoint, backend="native", dtype="float32")
