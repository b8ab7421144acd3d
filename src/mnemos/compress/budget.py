"""Each tensor's type by what it costs: the least divergence within a size, or the smallest size within a divergence.

How much a model diverges is nearly the sum of what its tensors' errors do to it, each nearly proportional to the error
of the tensor's output. So the divergence is measured once for each kind of tensor (all queries, all values, ...), with
these tensors alone rounded, and errors are measured on a few rows; the rest is arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnemos.compress.calibration import Calibration
from mnemos.compress.evaluate import Remembered, compare
from mnemos.compress.mixes import is_quantizable
from mnemos.compress.packing import FORMATS
from mnemos.compress.search import Costs, find_codes, is_searchable
from mnemos.contract import Floats
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from mnemos.formats.blocks import encode
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.hub.cache import Progress
from mnemos.models.load import load_model

TOKENS = 512  # of the calibration's, on which divergences are measured
PROBED_ROWS = 16  # of each part of a tensor, on which errors are measured
PROBE = TensorType.Q4_0  # coarse enough that the divergence is far above the noise, and its block divides most rows
_LOWEST_PRICE, _HIGHEST_PRICE = 1e-20, 1e3  # nats per byte: all tensors at their best, all at their smallest


@dataclass(frozen=True)
class Option:
    """A type that a tensor may have: its bytes, and the divergence to expect from it, in nats per token."""

    type: TensorType
    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """A type for each tensor, their bytes, and the divergence to expect from them."""

    types: dict[str, TensorType]
    bytes: int
    loss: float


def choose(options: Mapping[str, Sequence[Option]], *, size: int | None = None, loss: float | None = None) -> Choice:
    """The choice with the least loss within `size` bytes, or with the fewest bytes within `loss`: one of them is given.

    Every tensor takes the option with the least loss + price * bytes, at the price that just fits (Lagrange). What is
    left of a size then goes where it gains most. ConfigError if nothing fits.
    """
    smallest, best = _at(_HIGHEST_PRICE, options), _at(_LOWEST_PRICE, options)
    if size is not None and _bytes(smallest) > size:
        raise ConfigError(f"size leaves {size} bytes for the quantized tensors, which need at least {_bytes(smallest)}")
    if loss is not None and _loss(best) > loss:
        raise ConfigError(f"loss is {loss}; quantized tensors are expected to lose at least {_loss(best):.3g}")
    low, high = _LOWEST_PRICE, _HIGHEST_PRICE
    for _ in range(120):
        middle = (low * high) ** 0.5
        chosen = _at(middle, options)
        enough = _bytes(chosen) <= size if size is not None else _loss(chosen) > (loss or 0.0)
        low, high = (low, middle) if enough else (middle, high)
    chosen = _at(low, options) if size is None else _spend(_at(high, options), options, size)
    return Choice({name: one.type for name, one in chosen.items()}, _bytes(chosen), _loss(chosen))


def _at(price: float, options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    return {name: min(own, key=lambda one: (one.loss + price * one.bytes, one.bytes)) for name, own in options.items()}


def _bytes(chosen: Mapping[str, Option]) -> int:
    return sum(one.bytes for one in chosen.values())


def _loss(chosen: Mapping[str, Option]) -> float:
    return sum(one.loss for one in chosen.values())


def _spend(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], size: int) -> dict[str, Option]:
    """Takes better options while they fit, the most gain per byte first."""
    left = size - _bytes(chosen)
    steps = [
        ((chosen[name].loss - one.loss) / (one.bytes - chosen[name].bytes), name, one)
        for name, own in options.items()
        for one in own
        if one.bytes > chosen[name].bytes and one.loss < chosen[name].loss
    ]
    for _, name, one in sorted(steps, key=lambda step: -step[0]):
        more = one.bytes - chosen[name].bytes
        if 0 < more <= left and one.loss < chosen[name].loss:
            chosen[name], left = one, left - more
    return chosen


def candidates(tensors: Mapping[str, Tensor]) -> dict[str, list[TensorType]]:
    """The quantizable tensors of a GGUF model, each with the types whose blocks divide its rows, one at least."""
    found = {
        name: [type for type, format in FORMATS.items() if tensor.columns % format.block == 0]
        for name, tensor in tensors.items()
        if is_quantizable(name, tensor.shape)
    }
    return {name: types for name, types in found.items() if types}


def measure_options(calibration: Calibration, progress: Progress | None = None) -> dict[str, list[Option]]:
    """What each quantizable tensor may become, by measurement on the calibration's model and text.

    Tensors whose rows divide into no type's blocks are left out. Needs memory for two more float32 models.
    """
    tensors = calibration.checkpoint.tensors
    names = list(candidates(tensors))
    found: dict[str, dict[TensorType, float]] = {}
    rounded: dict[str, Tensor] = {}
    probed: dict[str, float] = {}
    for done, name in enumerate(names):
        if progress is not None:
            progress("measuring errors", done, len(names))
        tensor, moments = tensors[name], calibration.full_moments(name, names)
        if moments is None or moments.products is None:  # an embedding, whose rows are read and not multiplied
            products = np.eye(tensor.columns, dtype=np.float32)[None]
        else:
            products = moments.products
        if errors := _errors(tensor, products):
            found[name] = errors
            rounded[name], probed[name] = _probe(tensor, products)
    sensitivities = _sensitivities(calibration, rounded, probed, progress)
    return {
        name: [
            Option(type, type.row_bytes(tensors[name].columns) * tensors[name].rows, sensitivities[_kind(name)] * error)
            for type, error in errors.items()
        ]
        for name, errors in found.items()
    }


def _kind(name: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"^blk\.\d+\.", "", name)


def _parts(tensor: Tensor, products: Floats) -> list[tuple[Floats, Floats]]:
    """A sample of rows of each part of the tensor, with the part's products."""
    per_part = tensor.rows // len(products)
    step = max(1, per_part // PROBED_ROWS)
    return [
        (tensor.take_rows(np.arange(part * per_part, (part + 1) * per_part, step)).dequantize(), own)
        for part, own in enumerate(products)
    ]


def _errors(tensor: Tensor, products: Floats) -> dict[TensorType, float]:
    """The relative squared error of the tensor's output by type, on a sample of its rows."""
    errors = {type: 0.0 for type, format in FORMATS.items() if tensor.columns % format.block == 0}
    energy = 0.0
    for rows, own in _parts(tensor, products):
        costs = Costs.of(own)
        energy += costs.of_error(rows)
        for type in list(errors):
            if is_searchable(rows, type):
                errors[type] += costs.of_error(find_codes(rows, type, costs).values(FORMATS[type]) - rows)
            else:
                del errors[type]
    return {type: error / energy if energy else 0.0 for type, error in errors.items()}


def _probe(tensor: Tensor, products: Floats) -> tuple[Tensor, float]:
    """The whole tensor rounded, and the relative squared error of its output."""
    type = PROBE if tensor.columns % PROBE.block[0] == 0 else TensorType.BF16
    data = encode(tensor.dequantize().reshape(tensor.rows, tensor.columns), type)
    rounded = Tensor(tensor.name, type, tensor.shape, data)
    error, energy = 0.0, 0.0
    for (exact, own), (coarse, _) in zip(_parts(tensor, products), _parts(rounded, products), strict=True):
        costs = Costs(own, own)  # without damping; nothing is searched
        error += costs.of_error(coarse - exact)
        energy += costs.of_error(exact)
    return rounded, error / energy if energy else 0.0


def _sensitivities(
    calibration: Calibration, rounded: Mapping[str, Tensor], errors: Mapping[str, float], progress: Progress | None
) -> dict[str, float]:
    """By kind of tensor: the divergence per relative squared error of its tensors' outputs."""
    checkpoint = calibration.checkpoint
    kinds = list(dict.fromkeys(map(_kind, rounded)))
    chunks = [calibration.token_ids[: min(TOKENS, calibration.chunk)]]
    found = {}
    with _engine(checkpoint) as engine:
        exact = Remembered(engine)
        for done, kind in enumerate(kinds):
            if progress is not None:
                progress("measuring divergences", done, len(kinds))
            own = {name: tensor for name, tensor in rounded.items() if _kind(name) == kind}
            with _engine(replace(checkpoint, tensors={**checkpoint.tensors, **own})) as coarse:
                divergence = compare(coarse, exact, chunks).divergence
            total = sum(errors[name] for name in own)
            found[kind] = divergence / total if total else 0.0
    return found


def _engine(checkpoint: Checkpoint) -> InferenceEngine:
    return InferenceEngine(load_model(checkpoint, dtype="float32"), prefix_cache=False)
