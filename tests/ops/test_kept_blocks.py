"""Matrices that leave out blocks of zeros, on every level of kernels: the bits of the products with zeros stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.ops.test_linear import random_weight

from mnemos import _native
from mnemos.formats.tensor_types import TensorType

# Panels: whole and partly empty; columns: odd and even numbers of blocks, several chunks of them; blocks of one panel,
# and of two, which are multiplied at once.
SIZES = [(16, 128, 16), (40, 32 * 9, 16), (100, 32 * 50, 16), (60, 32 * 9, 32), (100, 32 * 50, 32)]
KINDS = [TensorType.F32, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_1, TensorType.Q5_1]


def pruned(kind: TensorType, rows: int, columns: int, height: int = 16) -> npt.NDArray[np.uint8]:
    """Random weights in the file's form, flat; every other block of `height` rows and 64 columns is zero."""
    data = random_weight(kind, rows, columns).data.reshape(rows, columns // 32, -1).copy()
    gone = np.add.outer(np.arange(-(-rows // height)), np.arange(-(-columns // 64))) % 2 == 1
    data[gone.repeat(height, 0)[:rows].repeat(2, 1)[:, : columns // 32]] = 0
    return data.reshape(-1)


def matrix(data: npt.NDArray[np.uint8], kind: TensorType, rows: int, columns: int, *, skip: bool) -> Any:
    made = _native.allocate_matrix(data, int(kind), rows, columns, as_float32=False, order=None, skip_zeros=skip)
    _native.pack_matrices([(made, data, None, False)], _native.shared_pool(1))
    return made


def product(weights: Any, x: npt.NDArray[Any], *, precise: bool = False) -> npt.NDArray[Any]:
    """x W^T + 1, of the type of x."""
    step = _native.ForeignStep(_native.shared_pool(1))
    y = np.empty((len(x), weights.rows), x.dtype)
    number = step.add(weights, np.ones(weights.rows, np.float32), precise)
    step.multiply(number, x.ctypes.data, len(x), y.ctypes.data)
    return y


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "columns", "height"), SIZES)
def test_products_have_the_bits_of_those_with_zeros(
    kind: TensorType, rows: int, columns: int, height: int, isa: str
) -> None:
    data = pruned(kind, rows, columns, height)
    whole, kept = (matrix(data, kind, rows, columns, skip=skip) for skip in (False, True))
    assert kept.bytes < whole.bytes * 0.9
    x = np.random.default_rng(0).standard_normal((70, columns)).astype(np.float32)
    if kind is TensorType.BF16:
        x = (x.view(np.uint32) >> 16).astype(np.uint16)
    for precise in (False, True):
        exact = product(whole, x, precise=precise)
        for count in (1, 2, 3, 5, 8, 9, 13, 17, 33, 70):
            assert (product(kept, x[:count], precise=precise) == exact[:count]).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_are_read_with_their_zeros(kind: TensorType) -> None:
    rows, columns = 40, 288
    data = pruned(kind, rows, columns)
    numbers = np.array([39, 0, 17], np.int64)
    found = np.empty((2, 3, columns), np.float32)
    for skip, values in zip((False, True), found, strict=True):
        _native.gather_rows(matrix(data, kind, rows, columns, skip=skip), numbers.ctypes.data, 3, values.ctypes.data)
    assert (found[0] == found[1]).all() and (found[0] == 0).any(1).all()


def test_a_panel_or_a_matrix_of_zeros_adds_nothing() -> None:
    data = random_weight(TensorType.F32, 48, 96).data.copy().view(np.float32).reshape(48, 96)
    x = np.ones((9, 96), np.float32)
    for begin in (16, 0):
        data[begin:] = 0
        kept = matrix(data.view(np.uint8).reshape(-1), TensorType.F32, 48, 96, skip=True)
        assert (product(kept, x)[:, begin:] == 1).all()


@pytest.mark.parametrize(("columns", "zeros"), [(96, 0.0), (80, 0.5)])
def test_where_it_would_not_pay_or_blocks_do_not_fit_all_is_stored(columns: int, zeros: float) -> None:
    data = random_weight(TensorType.F32, 64, columns).data.copy()
    if zeros:
        data[: len(data) // 2] = 0
    whole, kept = (matrix(data, TensorType.F32, 64, columns, skip=skip) for skip in (False, True))
    assert kept.bytes == whole.bytes
