"""What can be removed from a module as a whole: hidden neurons, and attention heads with their keys and values.

Nothing is known of a module but what it does. It runs once over a few tokens with every matrix cut out of the flow: a
matrix's output is replaced by noise, a leaf of the graph. The gradients between the outputs of matrices
and the inputs of the next ones then say which columns of a reader depend on which rows of its writers. Columns that
depend on rows of their own are a unit: single columns are the neurons of a feed-forward layer, however its activation
and gates are written; equal runs of columns are groups of heads, however queries, keys and values are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import logits_of
from mnemos.compress.modules.layers import matrix_of


@dataclass(frozen=True)
class Units:
    """Columns of one matrix that can be removed with the rows of those that write to them.

    reader  the matrix that reads them, by name
    size    its consecutive columns in a unit: 1 for neurons, more for heads
    count   how many units there are
    rows    for each matrix that writes to them, which unit each of its rows belongs to, (rows,) int64; -1: none
    """

    reader: str
    size: int
    count: int
    rows: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """ "neurons" or "heads"."""
        return "neurons" if self.size == 1 else "heads"


def find_units(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> list[Units]:
    """The units of a module's matrices, in the order in which they are read; `inputs`: a few tokens.

    Matrices that are called more than once, or whose output something else reads too, are in none.
    """
    flow = _Flow.of(model, layers, inputs)
    found = [_units_of(flow, reader) for reader in flow.inputs]
    return [one for one in found if one is not None]


@dataclass
class _Flow:
    """One run: what each matrix was given, before the cut; what it wrote, as leaves; and who reads whom."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    readers: dict[str, set[str]]  # of each writer; "" is whatever leaves the module

    @classmethod
    def of(cls, model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> _Flow:
        """Runs the module over `inputs`, in evaluation mode."""
        generator = torch.Generator().manual_seed(0)
        seen: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        repeated: set[str] = set()

        def cut_input(name: str) -> Callable[..., Any]:
            def hook(layer: nn.Module, given: tuple[Any, ...]) -> Any:
                repeated.update({name} & seen.keys())
                seen[name] = given[0]
                return (given[0].detach(), *given[1:])

            return hook

        def cut_output(name: str) -> Callable[..., Any]:
            def hook(layer: nn.Module, given: Any, value: Tensor) -> Tensor:
                written[name] = _noise(value.detach(), generator).requires_grad_()
                return written[name].clone()  # which may be written to in place

            return hook

        hooks = []
        for name, layer in layers.items():
            hooks += [layer.register_forward_pre_hook(cut_input(name)), layer.register_forward_hook(cut_output(name))]
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Embedding):  # it writes too, but no row of it belongs to a unit
                hooks.append(layer.register_forward_hook(cut_output(name)))
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.enable_grad():
                seen[""] = logits_of(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode
        writers = list(written)
        readers: dict[str, set[str]] = {name: set() for name in writers}
        for name, value in seen.items():
            for writer, gradient in zip(writers, _gradients(value, None, list(written.values())), strict=True):
                if gradient is not None:
                    readers[writer].add(name)
        known = {name: value for name, value in seen.items() if name and name not in repeated}
        embeddings = {name for name in writers if name not in layers}
        for writer in repeated | embeddings:
            readers.setdefault(writer, set()).add("")
        return cls(known, written, readers)

    def support(self, reader: str, columns: Tensor, writers: list[str]) -> list[Tensor]:
        """For each writer, which of its rows some columns (columns,) bool of a reader depend on."""
        gradients = _gradients(self.inputs[reader], columns, [self.outputs[name] for name in writers])
        return [
            torch.zeros(self.outputs[name].shape[-1], dtype=torch.bool, device=columns.device)
            if gradient is None
            else (gradient != 0).flatten(0, -2).any(0)
            for name, gradient in zip(writers, gradients, strict=True)
        ]


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random values as large as these (..., columns), of either sign at every second position of a column.

    ReLU and its like pass nothing on from values below zero: without a value above it, nothing could be seen to depend
    on the column.
    """
    noise = torch.randn(like.shape, generator=generator).flatten(0, -2)
    pairs = len(noise) // 2
    noise[pairs : 2 * pairs] = -noise[:pairs]
    return noise.view(like.shape).to(like) * like.square().mean().sqrt().clamp_min(1e-3)


def _gradients(value: Tensor, columns: Tensor | None, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a random combination of a tensor's values, or of some columns of it."""
    if not value.requires_grad:
        return (None,) * len(leaves)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(value.shape, generator=generator, device="cpu").to(value)
    if columns is not None:
        weights = weights * columns
    return torch.autograd.grad(value, leaves, weights, retain_graph=True, allow_unused=True)


def _units_of(flow: _Flow, reader: str) -> Units | None:
    writers = [name for name, readers in flow.readers.items() if reader in readers]
    if not writers or any(flow.readers[name] != {reader} for name in writers):
        return None
    width = flow.inputs[reader].shape[-1]
    columns = torch.arange(width, device=flow.inputs[reader].device)
    for size in range(1, width // 2 + 1):
        if width % size:
            continue
        first = flow.support(reader, columns < size, writers)
        others = flow.support(reader, columns >= size, writers)
        if any(mine.any() for mine in first) and not any(
            (mine & theirs).any() for mine, theirs in zip(first, others, strict=True)
        ):
            rows = _rows(flow, reader, columns // size, writers)
            return None if rows is None else Units(reader, size, width // size, rows)
    return None


def _rows(flow: _Flow, reader: str, unit: Tensor, writers: list[str]) -> dict[str, Tensor] | None:
    """Which unit each writer's rows belong to, read off bit by bit; None where one belongs to two."""
    numbers = [torch.zeros(flow.outputs[name].shape[-1], dtype=torch.int64, device=unit.device) for name in writers]
    used = [torch.zeros_like(number, dtype=torch.bool) for number in numbers]
    for bit in range(max(int(unit.max()).bit_length(), 1)):
        chosen = (unit >> bit & 1).bool()
        ones, zeros = flow.support(reader, chosen, writers), flow.support(reader, ~chosen, writers)
        for i, (one, zero) in enumerate(zip(ones, zeros, strict=True)):
            if (one & zero).any() or (bit and ((one | zero) != used[i]).any()):
                return None
            used[i] = one | zero
            numbers[i] += one.long() << bit
    return {name: torch.where(u, n, -1) for name, n, u in zip(writers, numbers, used, strict=True)}


def columns_of(units: Units, kept: Tensor) -> Tensor:
    """The reader's columns, (columns,) bool, of the units that stay, (count,) bool."""
    return kept.repeat_interleave(units.size)


def size_of(units: Units, layers: Mapping[str, nn.Module]) -> int:
    """The weights that all of the units have together."""
    written = sum(int((rows >= 0).sum()) * matrix_of(layers[name]).shape[1] for name, rows in units.rows.items())
    return written + matrix_of(layers[units.reader]).numel()
