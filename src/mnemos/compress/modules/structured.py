"""Removes whole neurons and heads: the matrices become smaller, and what reads the rest is fitted anew.

Which go is decided together with the fit: again and again those whose removal changes the reader's products least, when
its other columns may make up for them, as Optimal Brain Surgeon does for single weights (Hassibi & Stork, 1993; for
structures, Kurtic et al., "ZipLM", 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating, logits_of
from mnemos.compress.modules.layers import is_matrix, matrix_of, set_matrix
from mnemos.compress.modules.masks import DAMPING
from mnemos.compress.modules.moments import Moments
from mnemos.compress.modules.units import Units, columns_of

ROUNDS = 8
MULTIPLE, MANY = 32, 512  # of many neurons a multiple stays, which blocks of quantized weights need


@dataclass(frozen=True)
class Removed:
    """What became of one group of neurons or heads.

    kind: "neurons", "heads" or "layers"; reason: why nothing was removed, else empty
    """

    name: str
    kind: str
    before: int
    after: int
    reason: str = ""


def kept_count(units: Units, ratio: float) -> int:
    """How many units stay when `ratio` of them go: at least one."""
    exact = units.count * (1 - ratio)
    if units.size == 1 and units.count >= MANY:
        return max(MULTIPLE, round(exact / MULTIPLE) * MULTIPLE)
    return max(1, round(exact))


def choose_by_weights(units: Units, layers: Mapping[str, nn.Module], count: int) -> Tensor:
    """The `count` units, (units,) bool, with the largest norms of rows times norms of columns."""
    reader = matrix_of(layers[units.reader]).float()
    score = reader.square().sum(0).reshape(units.count, units.size).sum(1)
    for name, rows in units.rows.items():
        norms = matrix_of(layers[name]).float().square().sum(1)
        member = rows >= 0
        score = score * torch.zeros_like(score).index_add_(0, rows[member], norms[member])
    return _largest(score, count)


def choose_and_fit(
    weight: Tensor, moments: Moments, units: Units, count: int, *, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(units that stay, (units,) bool; the reader's weights for them; what is added to its bias).

    weight (out, columns) float32: the reader's.
    """
    inputs = moments.covariance() if has_bias else moments.second
    inputs = inputs + torch.diag(DAMPING * inputs.diagonal().mean() + torch.zeros(len(inputs)).to(inputs))
    target = weight @ inputs
    kept = torch.ones(units.count, dtype=torch.bool, device=weight.device)
    rounds = ROUNDS if len(inputs) <= 1024 else 3  # each inverts the moments
    for left in range(rounds, 0, -1):
        going = -(-(int(kept.sum()) - count) // left)
        if going <= 0:
            continue
        fitted, inverse = _fit(target, inputs, columns_of(units, kept))
        loss = _losses(fitted, inverse, units.size)
        where = kept.nonzero()[:, 0]
        kept[where[loss.topk(going, largest=False).indices]] = False
    columns = columns_of(units, kept)
    fitted, _ = _fit(target, inputs, columns)
    return kept, fitted, weight @ moments.mean - fitted @ moments.mean[columns]


def _fit(target: Tensor, inputs: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The least squares weights over some columns, and the inverse of the moments of these."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs[columns][:, columns]))
    return target[:, columns] @ inverse, inverse


def _losses(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What removing each unit costs when the others are fitted again, (units,)."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // size
    own = torch.stack([inverse[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    parts = weight.T.reshape(count, size, -1)
    losses: Tensor = (torch.linalg.solve(own, parts) * parts).sum((1, 2))
    return losses


def _largest(score: Tensor, count: int) -> Tensor:
    kept = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    kept[score.topk(count).indices] = True
    return kept


def remove(
    model: nn.Module, units: Units, kept: Tensor, numbers: Numbers, fitted: tuple[Tensor, Tensor] | None = None
) -> None:
    """Leaves the units that stay, (units,) bool. The matrices get new, smaller parameters.

    numbers: see `find_numbers`; fitted: the reader's weight for them, and what is added to its bias.
    """
    for name, rows in units.rows.items():
        layer = model.get_submodule(name)
        stays = (rows < 0) | kept[rows.clamp_min(0)]
        bias = cast("Tensor | None", layer.bias)
        set_matrix(layer, matrix_of(layer)[stays], None if bias is None else bias.detach()[stays])
    reader = model.get_submodule(units.reader)
    bias = cast("Tensor | None", reader.bias)
    if fitted is None:
        set_matrix(reader, matrix_of(reader)[:, columns_of(units, kept)], None if bias is None else bias.detach())
    else:
        set_matrix(reader, fitted[0], None if bias is None else bias.detach() + fitted[1])
    _set_numbers(model, numbers, int(kept.sum()), units.count)


Numbers = tuple[tuple[str, str, int], ...]
"""Attributes that count heads or their width: (module, attribute, its value with all of them)."""


def _set_numbers(model: nn.Module, numbers: Numbers, kept: int, count: int) -> None:
    for module, attribute, value in numbers:
        setattr(model.get_submodule(module), attribute, value * kept // count)


def find_numbers(model: nn.Module, units: Units, inputs: Any) -> Numbers | None:
    """What has to be changed beside the matrices so that the module still runs, found by trying; None if nothing helps.

    Half of the units are removed for the trial, and the module must then answer as it does when these are zeroed.
    """
    kept = torch.arange(units.count) < max(1, units.count // 2)
    kept = kept.to(matrix_of(model.get_submodule(units.reader)).device)
    for numbers in _candidates(model, units):
        with _restored(model, units, numbers):
            reader = model.get_submodule(units.reader)
            bias = cast("Tensor | None", reader.bias)
            masked = matrix_of(reader) * columns_of(units, kept)
            set_matrix(reader, masked, None if bias is None else bias.detach())
            with evaluating(model):
                expected = logits_of(model, inputs)
        with _restored(model, units, numbers):
            remove(model, units, kept, numbers)
            try:
                with evaluating(model):
                    answer = logits_of(model, inputs)
            except Exception:  # shapes that do not fit any more
                continue
            tolerance = 1e-3 if answer.dtype == torch.float32 else 0.05
            if answer.shape == expected.shape and torch.allclose(
                answer, expected, rtol=tolerance, atol=tolerance * float(expected.std())
            ):
                return numbers
    return None


def _candidates(model: nn.Module, units: Units) -> Iterator[Numbers]:
    """Sets of attributes that may count heads, the likeliest first. A neuron needs none."""
    if units.size == 1:
        yield ()
        return
    owner = _owner([units.reader, *units.rows])
    width = units.size * units.count
    heads, widths = [], []
    for path, module in model.get_submodule(owner).named_modules(prefix=owner):
        for name, value in vars(module).items():
            if type(value) is not int or is_matrix(module):
                continue
            if "head" in name and "dim" not in name and "size" not in name and value > 0 and value % units.count == 0:
                heads.append((path, name, value))
            elif value == width:
                widths.append((path, name, value))
    tried = set()
    for numbers in ((*heads, *widths), tuple(heads), ()):
        if numbers not in tried:
            tried.add(numbers)
            yield numbers


def _owner(names: Sequence[str]) -> str:
    """The innermost module that all these are in."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


@contextmanager
def _restored(model: nn.Module, units: Units, numbers: Numbers) -> Iterator[None]:
    """Afterwards the matrices and attributes are what they were."""
    layers: list[Any] = [model.get_submodule(name) for name in (units.reader, *units.rows)]
    held = [(layer, dict(layer._parameters), _sizes(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, parameters, sizes in held:
            layer._parameters.update(parameters)
            layer.__dict__.update(sizes)
        _set_numbers(model, numbers, 1, 1)


def _sizes(layer: Any) -> dict[str, int]:
    names = ("in_features", "out_features", "nf", "nx")
    return {name: layer.__dict__[name] for name in names if name in layer.__dict__}
