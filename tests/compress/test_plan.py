"""Mixes are llama.cpp's: the types of every tensor, and with them the bytes."""

from collections import Counter

import numpy as np
import pytest

from mnemos.compress.plan import mix_named, override_of, plan
from mnemos.errors import ConfigError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType as T


def model(layers=30, width=576, inner=1536, kv=192, vocabulary=49152, tied=True, **metadata):
    """A Llama's tensors (without data) and metadata; by default SmolLM2-135M's."""
    shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocabulary, width)
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q.weight": (width, width),
            f"blk.{i}.attn_k.weight": (kv, width),
            f"blk.{i}.attn_v.weight": (kv, width),
            f"blk.{i}.attn_output.weight": (width, width),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (inner, width),
            f"blk.{i}.ffn_up.weight": (inner, width),
            f"blk.{i}.ffn_down.weight": (width, inner),
        }
    empty = np.zeros(0, np.uint8)
    tensors = {n: Tensor(n, T.F32 if len(s) == 1 else T.F16, s, empty) for n, s in shapes.items()}
    values = {"block_count": layers, "attention.head_count": 9, "attention.head_count_kv": 3, **metadata}
    return tensors, {"general.architecture": "llama", **{f"llama.{key}": value for key, value in values.items()}}


def types(rows, part):
    return [row.type.name for row in rows if part in row.name]


# What llama.cpp 0.3.36 of llama-cpp-python writes for SmolLM2-135M: bytes of the tensors and weights by type.
SMOLLM2 = {
    "q8_0": (143025408, {"Q8_0": 134479872}),
    "q6_k": (136597248, {"Q8_0": 107937792, "Q6_K": 26542080}),
    "q5_k_m": (110317824, {"Q5_1": 78077952, "Q8_0": 29859840, "Q6_K": 12386304, "Q5_K": 14155776}),
    "q4_k_m": (103668480, {"Q5_0": 78077952, "Q8_0": 29859840, "Q6_K": 12386304, "Q4_K": 14155776}),
    "q4_0": (89941248, {"Q4_0": 106168320, "Q8_0": 28311552}),
    "q3_k_m": (
        91724544,
        {"Q4_0": 66355200, "Q5_1": 221184, "Q5_0": 13049856, "Q5_K": 884736, "Q4_K": 25657344, "Q8_0": 28311552},
    ),
    "q2_k": (86416128, {"Q4_0": 79626240, "Q3_K": 26542080, "Q8_0": 28311552}),
}


@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2_becomes_what_llama_cpp_makes_of_it(name):
    rows = plan(*model(), mix_named(name)[1])
    weights = Counter()
    for row in rows:
        if len(row.shape) == 2:
            weights[row.type.name] += row.shape[0] * row.shape[1]
    expected_bytes, expected = SMOLLM2[name]
    assert dict(weights) == expected
    assert sum(row.bytes for row in rows) == expected_bytes


def test_with_importance_the_first_layers_of_q4_0_get_minima():
    rows = plan(*model(), mix_named("q4_0")[1], calibrated=True)
    assert types(rows, "ffn_down") == ["Q4_1"] * 3 + ["Q4_0"] * 27
    assert sum(row.bytes for row in rows) == 90107136


def test_a_model_of_a_fitting_width_has_no_fallback():
    tensors, metadata = model(layers=32, width=4096, inner=14336, kv=1024, tied=False, **{"attention.head_count": 32})
    metadata["llama.attention.head_count_kv"] = 8
    for name, values, down, output in [
        ("q4_k_s", ["Q5_K"] * 4 + ["Q4_K"] * 28, ["Q5_K"] * 4 + ["Q4_K"] * 28, "Q4_K"),
        ("q3_k_m", ["Q5_K"] * 2 + ["Q4_K"] * 30, ["Q5_K"] * 2 + ["Q4_K"] * 30, "Q4_K"),
        ("q3_k_l", ["Q5_K"] * 32, ["Q5_K"] * 32, "Q5_K"),
        ("q3_k_s", ["Q3_K"] * 32, ["Q3_K"] * 32, "Q3_K"),
        ("q2_k", ["Q4_K"] * 32, ["Q3_K"] * 32, "Q3_K"),
        ("q2_k_s", ["Q4_K"] * 32, ["Q4_K"] * 4 + ["Q2_K"] * 28, "Q2_K"),
        ("iq4_xs", ["Q5_K"] * 32, ["Q5_K"] * 4 + ["IQ4_XS"] * 28, "IQ4_XS"),
        ("q5_k_s", ["Q5_K"] * 32, ["Q5_K"] * 32, "Q5_K"),
    ]:
        rows = plan(tensors, metadata, mix_named(name)[1])
        assert not any(row.reason for row in rows)
        assert types(rows, "attn_output") == [output] * 32, name
        assert types(rows, "attn_v") == values and types(rows, "ffn_down") == down, name
        assert [row.type.name for row in rows if row.name == "output.weight"] == ["Q6_K"]
    rows = plan(tensors, metadata, mix_named("Q4_K")[1])
    sensitive = [i < 4 or i >= 28 or (i - 4) % 3 == 2 for i in range(32)]
    assert types(rows, "ffn_down") == types(rows, "attn_v") == ["Q6_K" if s else "Q4_K" for s in sensitive]


def test_mixtures_of_eight_experts_keep_attention_better():
    tensors, metadata = model(layers=4, width=4096, inner=14336, kv=1024, expert_count=8)
    for i in range(4):
        gate = f"blk.{i}.ffn_gate_inp.weight"
        tensors[gate] = Tensor(gate, T.F32, (8, 4096), np.zeros(0, np.uint8))
    rows = plan(tensors, metadata, mix_named("q4_k_m")[1])
    assert types(rows, "attn_v") == types(rows, "attn_k") == ["Q8_0"] * 4
    assert types(rows, "attn_output") == ["Q5_K"] * 4
    assert types(rows, "ffn_gate_inp") == ["F32"] * 4


def test_norms_and_biases_stay():
    rows = plan(*model(), mix_named("q2_k")[1])
    assert {row.type for row in rows if len(row.shape) == 1} == {T.F32}
    assert not any(row.changes for row in rows if len(row.shape) == 1)


def test_rows_that_no_block_divides_become_float16():
    rows = plan(*model(layers=1, width=40, inner=80), mix_named("q4_k_m")[1])
    assert {row.type for row in rows if len(row.shape) == 2} == {T.F16}
    assert "Q4_K needs rows of a multiple of 256 values, these have 40" in {row.reason for row in rows}


def test_overrides_are_obeyed_and_the_first_wins():
    overrides = [override_of("blk.[01]..*ffn_down=q6_k"), override_of("ffn_down=F16"), override_of("^token_embd=q4_0")]
    rows = plan(*model(layers=3), mix_named("q4_0")[1], overrides=overrides)
    assert types(rows, "ffn_down") == ["Q6_K", "Q6_K", "F16"] and types(rows, "token_embd") == ["Q4_0"]
    assert {row.reason for row in rows if "ffn_down" in row.name} == {"by override"}
    assert types(rows, "norm") == ["F32"] * 7


@pytest.mark.parametrize(
    "text, problem",
    [
        ("ffn_down", "expected PATTERN=TYPE"),
        ("ffn_down=q4_k_m", "type in 'ffn_down=q4_k_m' is 'q4_k_m'; did you mean q4_k"),
        ("(=q4_k", "no regular expression"),
        ("attn_q=q4_k", "attn_q.weight with rows of 576 values; Q4_K needs a multiple of 256"),
        ("ffn_dwn=q4_0", "ffn_dwn=q4_0 matches no matrix; names are like 'blk.29.ffn_down.weight'"),
        ("output_norm=f16", "matches no matrix"),
    ],
)
def test_overrides_that_cannot_be_obeyed_are_refused(text, problem):
    with pytest.raises(ConfigError, match=problem):
        plan(*model(), mix_named("q4_0")[1], overrides=[override_of(text)])


def test_an_unknown_type_is_named():
    with pytest.raises(ConfigError, match="type is 'q4_k_l'; did you mean q4_k_s"):
        mix_named("q4_k_l")
    with pytest.raises(ConfigError, match="the types are f32, f16"):
        mix_named("tiny")
