"""Quantized rows of memory banks."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.errors import ConfigError
from mnemos.formats.quantized_rows import QuantizedRows, pack_nibbles, unpack_nibbles


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_a_value_is_off_by_at_most_half_its_rows_scale(bits: int, largest: int) -> None:
    rows = np.random.default_rng(3).normal(size=(37, 30)).astype(np.float32) * np.logspace(-3, 3, 37)[:, None]
    quantized = QuantizedRows.of(rows.astype(np.float32), bits)
    np.testing.assert_allclose(quantized.scales, np.abs(rows).max(1) / largest, rtol=1e-6)
    assert (np.abs(quantized.values() - rows) <= quantized.scales[:, None] * 0.5001).all()
    assert quantized.nbytes == 37 * 30 * bits // 8 + 4 * 37


def test_halves_go_to_the_even_code_and_zero_rows_stay_zero() -> None:
    rows = np.array([[0.5, 1.5, 2.5, 127], [0, 0, 0, 0], [-127, 126.5, 0, 1]], dtype=np.float32)
    quantized = QuantizedRows.of(rows, 8)
    assert quantized.codes.tolist() == [[0, 2, 2, 127], [0, 0, 0, 0], [-127, 126, 0, 1]]
    assert quantized.scales[1] == np.float32(1e-8) and not quantized.values()[1].any()


def test_the_even_column_is_in_the_low_nibble() -> None:
    codes = np.array([[-8, 7, 1, -1]], dtype=np.int8)
    packed = pack_nibbles(codes)
    assert packed.view(np.uint8).tolist() == [[0x78, 0xF1]]
    assert unpack_nibbles(packed).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [((4, 4), 2, "bits is 2; it must be 4 or 8"), ((4, 3), 4, "width 3; 4 bits need an even one"),
     ((2, 2, 2), 8, "3 axes; it must have 2")],
)  # fmt: skip
def test_what_cannot_be_quantized(shape: tuple[int, ...], bits: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizedRows.of(np.zeros(shape, np.float32), bits)
