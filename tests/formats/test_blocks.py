"""Encoded blocks are ggml's, byte for byte; what a type cannot hold is named, never stored."""

import numpy as np
import pytest

from mnemos.errors import ConfigError, FormatError
from mnemos.formats import blocks
from mnemos.formats.blocks import ENCODERS, encode, encode_rows, reference_rows
from mnemos.formats.quants import dequantize
from mnemos.formats.tensor_types import TensorType
from mnemos.native import core

T = TensorType
QUANTIZED = [t for t in T if t.is_quantized]
COLUMNS = 768
native = pytest.mark.skipif(core is None, reason="the native core is not built")


def rows(kind: str) -> np.ndarray:
    generator = np.random.default_rng(sum(map(ord, kind)))
    normal = generator.standard_normal((21, COLUMNS))
    values = {
        "normal": normal * 0.02,
        "outliers": normal * np.where(generator.random(normal.shape) < 0.01, 50, 1),
        "positive": np.abs(normal),
        "negative": -np.abs(normal) - 1,
        "sparse": normal * (generator.random(normal.shape) < 0.05),
        "grid": np.round(normal * 3) / 8,
        "constant": np.full((3, COLUMNS), 0.3),
        "zero": np.zeros((3, COLUMNS)),
        "tiny": normal * 1e-7,
        "denormal": normal * 1e-20,
        "large": normal * 2000,
    }
    return values[kind].astype(np.float32) + np.float32(0)  # without -0, whose sign a minimum need not keep


KINDS = (
    "normal",
    "outliers",
    "positive",
    "negative",
    "sparse",
    "grid",
    "constant",
    "zero",
    "tiny",
    "denormal",
    "large",
)


def importance() -> np.ndarray:
    weights = np.random.default_rng(5).random(COLUMNS).astype(np.float32) ** 4
    weights[7] = 0
    return weights


@pytest.fixture(params=core.available_isas() if core else [])
def level(request):
    core.select_isa(request.param)
    yield request.param
    core.select_isa("")


@native
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_the_bytes_are_those_of_ggml(type_, weighted, level):
    libgguf = pytest.importorskip("libgguf")
    weights = importance() if weighted else None
    for kind in KINDS:
        values = rows(kind)
        theirs = libgguf.quantize_rows(values, int(type_), weights).reshape(-1)
        assert np.array_equal(encode(values, type_, weights), theirs), kind


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", ENCODERS, ids=lambda t: t.name)
def test_the_native_encoders_equal_the_reference(type_, kind):
    values = rows(kind)
    ours, reference = (np.empty((len(values), type_.row_bytes(COLUMNS)), np.uint8) for _ in range(2))
    assert encode_rows(values, type_, None, ours) == reference_rows(values, type_, reference) == -1
    assert np.array_equal(ours, reference)


@native
@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_a_row_does_not_depend_on_its_neighbours(type_):
    values = rows("outliers")
    whole = encode(values, type_, importance()).reshape(len(values), -1)
    for row in (0, 9, 20):
        assert np.array_equal(encode(values[row], type_, importance()), whole[row])


@native
@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda t: t.name)
def test_importance_lowers_the_error_where_it_is_high(type_):
    values, weights = rows("normal"), importance()

    def error(data):
        return float((weights * (dequantize(data, type_).reshape(values.shape) - values) ** 2).sum())

    plain, weighted = error(encode(values, type_)), error(encode(values, type_, weights))
    assert weighted == plain if type_ is T.Q8_0 else weighted < plain


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("type_", [*QUANTIZED, T.F16], ids=lambda t: t.name)
def test_the_first_row_that_does_not_fit_is_named(type_, bad):
    if core is None and type_ not in ENCODERS:
        pytest.skip("the native core is not built")
    values = np.repeat(rows("normal"), 20, axis=0)
    values[407, 300] = values[123, 5] = values[124, 700] = bad
    cause = "column 5; all values must be finite" if not np.isfinite(bad) else f"float16 numbers of {type_.name}"
    with pytest.raises(FormatError, match=rf"row 123 has .*{cause}"):
        encode(values, type_)


@native
@pytest.mark.parametrize("type_", [t for t in ENCODERS if t is not T.BF16], ids=lambda t: t.name)
def test_the_reference_finds_the_same_rows(type_):
    values = rows("normal")
    values[4, 3] = 1e9
    out = np.empty((len(values), type_.row_bytes(COLUMNS)), np.uint8)
    assert encode_rows(values, type_, None, out) == reference_rows(values, type_, out) == 4


@pytest.mark.parametrize("type_", [T.F32, T.F16, T.BF16], ids=lambda t: t.name)
def test_single_numbers_are_rounded_to_the_nearest(type_):
    values = np.array(
        [[0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, -1.5 * 2**-25]], np.float32
    )
    stored = dequantize(encode(values, type_), type_)
    expected = {
        T.F32: values,
        T.F16: values.astype(np.float16).astype(np.float32),
        T.BF16: np.array([[0, -0.0, 1, 1, 1 + 2**-6, 1, 1, 2**-24, -1.5 * 2**-25]], np.float32),
    }[type_]
    assert np.array_equal(stored, expected.reshape(-1)) and np.signbit(stored[1])


def test_wrong_shapes_and_importance_are_refused(monkeypatch):
    values = rows("normal")
    with pytest.raises(ConfigError, match="rows have 40 values; Q4_0 needs a multiple of 32"):
        encode(values[:, :40], T.Q4_0)
    with pytest.raises(ConfigError, match="infinite, NaN or negative"):
        encode(values, T.Q4_0, -importance())
    if core is not None:
        with pytest.raises(ConfigError, match="importance has 5 values; it must have one a column, 768"):
            encode(values, T.Q4_0, importance()[:5])


def test_the_reference_serves_without_the_native_core(monkeypatch):
    expected = encode(rows("normal"), T.Q8_0)
    monkeypatch.setattr(blocks, "core", None)
    assert np.array_equal(encode(rows("normal"), T.Q8_0), expected)
