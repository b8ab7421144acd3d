"""The search loses less of a layer's output than rounding does, in every block format, and its files are ordinary."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.compress.packing import FORMATS, pack
from mnemos.compress.search import Costs, find_codes, is_searchable, search_rows
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.blocks import encode
from mnemos.formats.quants import dequantize
from mnemos.formats.tensor_types import TensorType

pytest.importorskip("mnemos._native")
ROWS, COLUMNS = 19, 512  # not a whole number of the sixteen rows that are searched together


def weights(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, COLUMNS)) * rng.gamma(2.0, size=COLUMNS)).astype(np.float32)


def products(seed: int = 1) -> np.ndarray:
    """Second moments of inputs that depend on each other, as a language model's do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2000, 80)) @ rng.normal(size=(80, COLUMNS)) + rng.normal(size=(2000, COLUMNS))
    return (x.T @ x / len(x)).astype(np.float32)


def decoded(data: np.ndarray, type: TensorType, rows: int = ROWS) -> np.ndarray:
    return dequantize(data.reshape(-1), type).reshape(rows, COLUMNS)


@pytest.mark.parametrize("type", FORMATS, ids=lambda type: type.name)
def test_the_search_costs_less_than_weighed_rounding(type: TensorType) -> None:
    values, costs = weights(), Costs.of(products())
    rounded = encode(values, type, np.ascontiguousarray(costs.products.diagonal()))
    rounding = costs.of_error(decoded(rounded, type) - values)
    searched = costs.of_error(decoded(search_rows(values, type, costs), type) - values)
    first_pass = find_codes(values, type, costs, sweeps=0).values(FORMATS[type])
    assert searched < 0.6 * rounding
    assert searched <= costs.of_error(first_pass - values)


@pytest.mark.parametrize("type", [one for one, format in FORMATS.items() if format.block > format.group], ids=str)
def test_sweeps_improve_the_scales_of_a_superblock_together(type: TensorType) -> None:
    values, costs = weights(), Costs.of(products())
    errors = []
    for sweeps in (0, 1, 4):
        found = find_codes(values, type, costs, sweeps)
        errors.append(costs.of_error(found.values(FORMATS[type]) - values))
        np.testing.assert_array_equal(decoded(pack(found, type), type), found.values(FORMATS[type]))
    first = find_codes(values, type, costs, 0)
    assert errors[0] > errors[1] > errors[2]
    assert (find_codes(values, type, costs, 4).units != first.units).mean() > 0.3


def test_rows_do_not_depend_on_each_other() -> None:
    values, costs = weights(), Costs.of(products())
    whole = search_rows(values, TensorType.Q4_K, costs)
    for row in (0, 7, 18):
        np.testing.assert_array_equal(search_rows(values[row : row + 1], TensorType.Q4_K, costs)[0], whole[row])


@pytest.mark.parametrize("type", [TensorType.Q4_0, TensorType.Q5_0, TensorType.Q8_0], ids=lambda type: type.name)
def test_what_a_type_holds_exactly_stays_as_it_is(type: TensorType) -> None:
    values = decoded(encode(weights(), type), type)
    np.testing.assert_array_equal(decoded(search_rows(values, type, Costs.of(products())), type), values)


def test_zeros_and_unused_columns_are_no_trouble() -> None:
    values = weights()
    values[:, :64] = 0
    values[3] = 0
    unused = products()
    unused[:, 100:200] = unused[100:200] = 0
    for type in FORMATS:
        found = decoded(search_rows(values, type, Costs.of(unused)), type)
        assert np.isfinite(found).all()
        assert not found[3].any()
    assert decoded(search_rows(values, TensorType.Q8_0, Costs.of(np.zeros_like(unused))), TensorType.Q8_0).any()


def test_what_cannot_be_searched_is_refused() -> None:
    values, costs = weights(), Costs.of(products())
    assert is_searchable(values, TensorType.Q4_K)
    assert not is_searchable(values, TensorType.F16)
    with pytest.raises(ConfigError, match="type is F16; a search is there for Q4_0"):
        search_rows(values, TensorType.F16, costs)
    with pytest.raises(ConfigError, match="rows have 500 values; Q4_0 needs a multiple of 32"):
        search_rows(values[:, :500], TensorType.Q4_0, costs)
    for bad in (np.nan, np.inf, 1e6):
        values[4, 5] = bad
        assert not is_searchable(values, TensorType.Q4_K)
        with pytest.raises(FormatError, match="expected finite ones within float16's range"):
            search_rows(values, TensorType.Q4_0, costs)
    with pytest.raises(FormatError, match="second moments of the inputs are not finite"):
        Costs.of(np.full((32, 32), np.nan, dtype=np.float32))
