"""Weights in GGUF's block formats with less error than by rounding each to the nearest.

What a column's rounding does to the layer's output is made up for by the columns after it, weighed by the second
moments of the layer's inputs (Frantar et al. 2022, arXiv:2210.17323), and a block's scale is the one whose columns then
cost least. The files are ordinary GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnemos.compress.packing import FORMATS, Bytes, Codes, pack
from mnemos.contract import Floats
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.tensor_types import TensorType
from mnemos.native import require_core

DAMPING = 0.2  # of the mean square: a text says little about directions that its inputs hardly have
SWEEPS = 4  # improvements of scales and codes in turn, after the first pass; more gain little
LARGEST = 65504.0  # float16's; values beyond it are left to the plain encoders


@dataclass(frozen=True, eq=False)
class Costs:
    """What an error e of a row costs: e' products e. factor: the upper triangular U with inverse(products) = U'U."""

    products: Floats
    factor: Floats

    @classmethod
    def of(cls, products: Floats, damping: float = DAMPING) -> Costs:
        """The costs by the inputs' second moments (columns, columns), with `damping` times their mean on the diagonal.

        FormatError if they are not finite.
        """
        if not np.isfinite(products).all():
            raise FormatError("second moments of the inputs are not finite; expected finite weights")
        damped = products.astype(np.float64)
        damped = (damped + damped.T) / 2
        mean = float(np.mean(np.diagonal(damped)))
        damped[np.diag_indices(len(damped))] += damping * mean if mean > 0 else 1.0
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
        return cls(damped.astype(np.float32), np.ascontiguousarray(factor, dtype=np.float32))

    def of_error(self, error: Floats) -> float:
        """The cost of an error (rows, columns), summed over its rows."""
        return float(np.einsum("rc,rc->", error @ self.products, error, dtype=np.float64))


def is_searchable(values: Floats, type: TensorType) -> bool:
    """Whether `search_rows` takes these values in this type: not wide types, nor values beyond float16."""
    return type in FORMATS and bool((np.abs(values) < LARGEST).all())


def search_rows(values: Floats, type: TensorType, costs: Costs) -> Bytes:
    """The values (rows, columns) in a block format: uint8 (rows, bytes per row).

    ConfigError for a type without a search or rows that are no whole number of its blocks, FormatError for values that
    are not finite or beyond float16.
    """
    return pack(find_codes(values, type, costs), type)


def find_codes(values: Floats, type: TensorType, costs: Costs, sweeps: int = SWEEPS) -> Codes:
    """The codes that `search_rows` packs."""
    format = FORMATS.get(type)
    if format is None:
        raise ConfigError(f"type is {type.name}; a search is there for {', '.join(t.name for t in FORMATS)}")
    rows, columns = values.shape
    if columns % format.block:
        raise ConfigError(f"rows have {columns} values; {type.name} needs a multiple of {format.block}")
    if not is_searchable(values, type):
        raise FormatError(f"the values reach {np.abs(values).max():.3g}; expected finite ones within float16's range")
    core = require_core()
    found = Codes(
        np.empty((rows, columns), dtype=np.uint8),
        np.empty((rows, columns // format.block, 2), dtype=np.float32),
        np.empty((rows, columns // format.group, 2), dtype=np.int8),
    )
    core.search_rows(
        np.ascontiguousarray(values, dtype=np.float32), costs.products, costs.factor, format.numbers, sweeps,
        found.codes, found.units, found.integers, core.shared_pool(0),
    )  # fmt: skip
    return found
