"""Packing: what is packed is read back as the values that the codes stand for."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.compress.packing import FORMATS, Codes, pack
from mnemos.formats.quants import dequantize
from mnemos.formats.tensor_types import TensorType


@pytest.mark.parametrize("type", FORMATS, ids=lambda type: type.name)
def test_packed_codes_are_read_back(type: TensorType) -> None:
    format, rng = FORMATS[type], np.random.default_rng(int(type))
    rows, columns = 5, 512
    units = rng.normal(size=(rows, columns // format.block, 2)).astype(np.float16).astype(np.float32)
    if not format.minima:
        units[:, :, 1] = 0
    low = np.array([format.scale_low, 0])
    top = np.array([format.scale_top, format.minimum_top])
    found = Codes(
        rng.integers(0, format.top + 1, (rows, columns)).astype(np.uint8),
        units,
        rng.integers(low, top + 1, (rows, columns // format.group, 2)).astype(np.int8),
    )
    packed = pack(found, type)
    assert packed.shape == (rows, type.row_bytes(columns))
    np.testing.assert_allclose(
        dequantize(packed.reshape(-1), type).reshape(rows, columns), found.values(format), rtol=1e-5, atol=1e-6
    )
