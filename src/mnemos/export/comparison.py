"""A file's results beside the module's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.export.causes import grown_since, refuse_random, table_sizes
from mnemos.export.example import Example, answer_of
from mnemos.export.messages import GOES_ANOTHER_WAY, first_line
from mnemos.export.report import OF_LARGEST

Arrays = list[npt.NDArray[Any]]
Floats64 = npt.NDArray[np.float64]
Run = Callable[[Mapping[str, Tensor]], Arrays]  # forward's tensors -> the results of the file
Timed = Callable[[Mapping[str, Tensor], float], float]  # forward's tensors, and for how long to try -> seconds
_FEWEST_SHAPES = 3
_TINY = 1e-6  # results that are no larger count as nothing
_ROUNDING = 1e-3  # a smaller difference may be float32's
_LEAST_SECONDS = 0.15  # that each side is timed for


@dataclass(frozen=True)
class Measure:
    """How far two arrays of the same shape are apart, and in what."""

    of: Callable[[Floats64, Floats64], float]
    unit: str


def _largest(have: Floats64, want: Floats64) -> float:
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    finite = np.isfinite(want)
    scale = max(1.0, float(np.abs(want[finite]).max(initial=0.0)))
    apart = np.where(same, 0.0, np.abs(have - want))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max()) / scale


def _relative(have: Floats64, want: Floats64) -> float:
    apart = np.nan_to_num(have - want, nan=np.inf, posinf=np.inf, neginf=np.inf)
    size = math.sqrt(float(np.mean(want**2)))
    return math.sqrt(float(np.mean(apart**2))) / max(size, _TINY)


LARGEST = Measure(_largest, OF_LARGEST)
RELATIVE = Measure(_relative, "the results' root mean square")


@dataclass(frozen=True)
class Compared:
    """What was tried, and how far the results differed.

    error: the largest one, in the measure's unit; shapes: the sizes tried, as text; inputs: how
    many; left_out: shapes that the module itself refuses; unit: what the error is a part of.
    """

    error: float
    shapes: tuple[str, ...]
    inputs: int
    left_out: tuple[str, ...]
    unit: str


def compare(
    module: nn.Module, run: Run, example: Example, outputs: int, tolerance: float, what: str,
    measure: Measure = LARGEST,
) -> Compared:  # fmt: skip
    """Runs the file on the example and on other sizes and values. The module must be in evaluation mode.

    measure: of the difference, by default the largest one over max(1, the largest value expected).

    ModelError: the results differ by more than the tolerance, or the file fails where the module does not; it says for
    which sizes and values, and by how much.
    """
    worst, shapes, left_out, inputs = 0.0, dict[str, None](), dict[str, None](), 0
    before = table_sizes(module)
    for sizes, kind, tensors in example.others():
        label = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the example's shape"
        if label in left_out:
            continue
        try:
            answer = example.answer if kind == "example" else answer_of(module, tensors)
        except Exception:  # the module's own limit, such as a table of positions
            left_out[label] = None
            continue
        expected = [tensor for _, tensor in answer][:outputs]
        try:
            found = run(tensors)
        except Exception as error:
            raise ModelError(
                f"the {what} of {type(module).__name__} fails at {label} ({kind} values), where the module does not: "
                f"{first_line(error)}{grown_since(module, before) or _of_a_size(error)}"
            ) from error
        where = f"{what} of {type(module).__name__} at {label} ({kind} values)"
        difference = _difference(found, expected, where, measure)
        if not difference <= tolerance:
            refuse_random(module, tensors)
            raise ModelError(
                f"the {what} of {type(module).__name__} differs from the module by {difference:.3g} at {label} "
                f"({kind} values), more than {tolerance:.0e} of {measure.unit}"
                f"{grown_since(module, before) or _advice(difference)}"
            )
        worst = max(worst, difference)
        shapes[label] = None
        inputs += 1
    if example.axes and len(shapes) < min([_FEWEST_SHAPES, *map(len, example.only.values())]):
        raise ModelError(
            f"{type(module).__name__} takes only {len(shapes)} of the shapes tried ({'; '.join(shapes)}), too few to "
            f"compare the {what}; name the axes that vary in dynamic_axes"
        )
    return Compared(worst, tuple(shapes), inputs, tuple(left_out), measure.unit)


def _advice(difference: float) -> str:
    if difference < _ROUNDING:
        return "; so little may be rounding, which grows with the layers: give the exporter a larger tolerance"
    return (
        "; a branch that depends on the data or a size, or arithmetic in half precision, is the usual cause: express "
        "it with torch.where or in float32, or export with another method"
    )


def _of_a_size(error: Exception) -> str:
    if GOES_ANOTHER_WAY in first_line(error):  # which says it all
        return ""
    return (
        "; a loop over a size, or a size that Python computes with, is the usual cause, as tracing takes both from the "
        "example: compute with whole tensors, or export with another method"
    )


def _difference(found: Sequence[Any], expected: Sequence[Tensor], where: str, measure: Measure) -> float:
    if len(found) < len(expected):
        raise ModelError(f"the {where} returns {len(found)} tensors, the module {len(expected)}")
    worst = 0.0
    for got, tensor in zip(found, expected, strict=False):
        want = tensor.detach().to(torch.float64).cpu().numpy()
        have = np.asarray(got, dtype=np.float64)
        if have.shape != want.shape:
            raise ModelError(f"the {where} has the shape {have.shape}, the module's result {want.shape}")
        if not want.size:
            continue
        worst = max(worst, measure.of(have, want))
    return worst


def speed_ratios(module: nn.Module, run: Run, example: Example, timed: Timed | None = None) -> dict[str, float]:
    """How many times as fast as the module itself the file is, by what was timed: the smallest sizes, the example's.

    timed: the least seconds that the file takes for tensors, where that is not the time of `run`.
    """
    ratios = {}
    smallest = example.values(dict.fromkeys(example.axis_names, 1), "random", 1)
    for tensors in (smallest, example.tensors):
        size = " x ".join(str(size) for size in next(iter(tensors.values())).shape)
        try:
            own = _seconds(partial(answer_of, module, tensors))
            other = _seconds(partial(run, tensors)) if timed is None else timed(tensors, _LEAST_SECONDS)
        except Exception:  # a size that the module does not take, which `compare` has named
            continue
        ratios[size] = own / other
    return ratios


def _seconds(call: Callable[[], Any]) -> float:
    call()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _LEAST_SECONDS:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
