"""The inputs that a module is exported with, and the others that its file is tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating
from mnemos.errors import ConfigError, ModelError, shown
from mnemos.export.messages import first_line
from mnemos.models.foreign.plain_call import plain_call
from mnemos.models.foreign.signature import POSITION_NAMES, parameters_of

Axes = dict[str, dict[int, str]]  # the names of the axes whose sizes vary, by input
KINDS = ("random", "smallest", "largest", "other")  # of values that a file is tried on
_SIZES = ((1, 1), (1, 5), (2, 6), (3, 11), (2, 3), (1, 17))  # batch, and every other axis
_PASTS = (0, 4, 20)  # positions in a cache, tried in turn
PAST = "past"
SUM = " + "  # an axis may be named as the sum of others


@dataclass(frozen=True)
class Example:
    """Tensors for a module's forward, by the names of its parameters and in their order.

    names: what each is called in the file; axes: of these names; bounds: one more than the largest value of an input
    of integers; plausible: makes values out of drawn ones that the module can meet, where they depend on each other.
    answer: the tensors that the module returns for `tensors`, in order, each with the module's name for it or "";
    plain: it returns one tensor itself, for tensors given by position; only: the sizes to try of an axis.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    axes: Axes
    bounds: dict[str, int]
    answer: list[tuple[str, Tensor]]
    plain: bool
    plausible: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    only: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def axis_names(self) -> list[str]:
        """The varying axes in the order in which they first occur, without the sums of others."""
        names = dict.fromkeys(name for axes in self.axes.values() for name in axes.values())
        return [name for name in names if SUM not in name]

    def traced(self) -> Example:
        """With sizes that are neither 0 nor 1 and differ, so that a tracer takes none for a constant; not run yet."""
        sizes = self._sizes_of(self.tensors)
        taken: set[int] = set()
        for name in self.axis_names:
            size = max(sizes[name], 2)
            while size in taken:
                size += 1
            taken.add(size)
            sizes[name] = size
        return replace(self, tensors=self.values(sizes, "random", 0), answer=[])

    def fixed(self, tensors: dict[str, Tensor]) -> Example:
        """With these tensors, of whose sizes none varies; not run yet."""
        return replace(self, tensors=tensors, axes={}, only={}, answer=[])

    def others(self) -> Iterator[tuple[dict[str, int], str, dict[str, Tensor]]]:
        """(sizes of the varying axes, kind of values, tensors): the example itself first, then each size and kind."""
        yield self._sizes_of(self.tensors), "example", self.tensors
        for number, (batch, other) in enumerate(_SIZES if self.axes else _SIZES[:1]):
            sizes = {}
            for index, name in enumerate(self.axis_names):
                sizes[name] = batch if index == 0 else other + index - 1
                if name == PAST:
                    sizes[name] = _PASTS[number % len(_PASTS)]
                if name in self.only:
                    sizes[name] = self.only[name][number % len(self.only[name])]
            for kind in KINDS:
                yield sizes, kind, self.values(sizes, kind, number + 1)

    def values(self, sizes: Mapping[str, int], kind: str, seed: int) -> dict[str, Tensor]:
        """Tensors of these sizes; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed * len(KINDS) + (KINDS.index(kind) if kind in KINDS else 0))
        found = {}
        for name, tensor in self.tensors.items():
            shape = list(tensor.shape)
            for axis, label in self.axes.get(name, {}).items():
                shape[axis] = sum(sizes[part] for part in label.split(SUM))
            found[name] = self._tensor(name, tensor, shape, kind, generator)
        return found if self.plausible is None else self.plausible(found)

    def _tensor(self, name: str, like: Tensor, shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
        if "mask" in name or like.dtype == torch.bool:
            return torch.ones(tuple(shape), dtype=like.dtype)
        if name in POSITION_NAMES:
            return torch.arange(shape[-1], dtype=like.dtype).expand(tuple(shape)).contiguous()
        if like.is_floating_point():
            drawn = torch.randn(tuple(shape), generator=generator, device="cpu")
            signed = {"smallest": -drawn.abs(), "largest": drawn.abs()}.get(kind, drawn)
            return signed.to(like.dtype)
        bound = self.bounds[name]
        if kind in ("smallest", "largest"):
            return torch.full(tuple(shape), 0 if kind == "smallest" else bound - 1, dtype=like.dtype)
        return torch.randint(0, bound, tuple(shape), generator=generator, device="cpu").to(like.dtype)

    def _sizes_of(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        return {
            label: tensors[name].shape[axis]
            for name, axes in self.axes.items()
            for axis, label in axes.items()
            if SUM not in label
        }


def example_of(
    module: nn.Module,
    dummy_input: Any,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
) -> Example:
    """An example from what a caller gives: a tensor, several, or a mapping by parameter; None: token ids (2, 6).

    dynamic_axes: {input: {axis: name}}, or {input: [axes]}; None: the batch varies, and of integers (batch, time) the
    time too; {}: nothing varies. The module is run once, in evaluation mode. ConfigError names what does not fit;
    ModelError: the module fails on the example.
    """
    tensors = _tensors(module, dummy_input)
    if input_names is not None and len(input_names) != len(tensors):
        raise ConfigError(
            f"input_names is {shown(list(input_names))}, but dummy_input has {len(tensors)} tensors "
            f"({', '.join(tensors)}); expected a name for each"
        )
    names = dict(zip(tensors, input_names if input_names is not None else tensors, strict=True))
    axes = _default_axes(tensors) if dynamic_axes is None else _axes(dynamic_axes, tensors, names, output_names or ())
    answer, rows = _first_answer(module, tensors)
    by_position = [
        name
        for name, one in parameters_of(module).items()
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    plain = isinstance(answer, Tensor) and list(tensors) == by_position[: len(tensors)]
    plausible = getattr(module, "plausible", None)
    return Example(tensors, names, axes, _bounds(tensors, rows), list(flattened(answer)), plain, plausible)


def _tensors(module: nn.Module, dummy_input: Any) -> dict[str, Tensor]:
    parameters = parameters_of(module).values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    more = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    if dummy_input is None:
        dummy_input = torch.ones((2, 6), dtype=torch.int64)
    if isinstance(dummy_input, Mapping):
        unknown = [name for name in dummy_input if name not in named]
        if unknown and not more:
            raise ConfigError(f"dummy_input has {shown(unknown[0])}; forward takes {', '.join(named)}")
        given = {str(name): value for name, value in dummy_input.items()}
    else:
        several = list(dummy_input) if isinstance(dummy_input, (tuple, list)) else [dummy_input]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if rest is not None:  # forward(self, *tensors)
            named += [f"{rest}_{number}" for number in range(len(several) - len(named))]
        if not several or len(several) > len(named):
            raise ConfigError(f"dummy_input has {len(several)} tensors; forward takes {', '.join(named)}")
        given = dict(zip(named, several, strict=False))
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"dummy_input has {shown(value)} for {name}; expected a tensor, several of them, or a mapping by "
                "the names of forward's parameters"
            )
    return {name: value.detach().cpu() for name, value in given.items()}


def _default_axes(tensors: Mapping[str, Tensor]) -> Axes:
    axes: Axes = {}
    lengths: dict[int, str] = {}
    of_tokens = [tensor.shape for tensor in tensors.values() if tensor.dim() == 2 and not tensor.is_floating_point()]
    for name, tensor in tensors.items():
        if tensor.dim():
            axes[name] = {0: "batch"}
        if tensor.shape in of_tokens:  # also floats, such as a mask, of which there is one for each token
            label = f"{name}_sequence" if lengths else "sequence"  # another text has a length of its own
            axes[name][1] = lengths.setdefault(tensor.shape[1], label)
    return axes


def _axes(
    given: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Mapping[str, str], outputs: Sequence[str]
) -> Axes:
    by_file_name = {label: name for name, label in names.items()}
    axes: Axes = {}
    for key, value in given.items():
        name = by_file_name.get(key, key)
        if name not in tensors:
            if key in outputs or not outputs:
                continue  # an output's axes follow from the inputs'
            known = ", ".join([*by_file_name, *outputs])
            raise ConfigError(f"dynamic_axes has {shown(key)}; expected one of {known}")
        labels = dict(value) if isinstance(value, Mapping) else {int(axis): f"{key}_{axis}" for axis in value}
        rank = tensors[name].dim()
        for axis in labels:
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise ConfigError(f"dynamic_axes[{key!r}] has the axis {axis!r}; expected 0 to {rank - 1}")
        axes[name] = {axis % rank: str(label) for axis, label in labels.items()}
    return axes


def _first_answer(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[int, int]]:
    """What the module returns, and the rows of the tables that it looks its inputs up in, by the inputs' addresses."""
    rows: dict[int, int] = {}
    handles = [
        part.register_forward_pre_hook(
            lambda part, given: rows.setdefault(given[0].data_ptr(), part.num_embeddings) and None
        )
        for part in module.modules()
        if isinstance(part, nn.Embedding)
    ]
    try:
        with evaluating(module), plain_attention():  # in training mode a call would change running statistics
            return plain_call(module, tensors), rows
    except Exception as error:
        raise ModelError(f"{type(module).__name__} fails on dummy_input: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def _bounds(tensors: Mapping[str, Tensor], rows: Mapping[int, int]) -> dict[str, int]:
    """How many values an input of integers may have: the rows of the table that it looks up."""
    bounds = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            largest = int(tensor.max()) + 1 if tensor.numel() else 2
            bounds[name] = max(rows.get(tensor.data_ptr(), largest), 2)
    return bounds


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fast path of nn.MultiheadAttention, which no file has and which differs for padded rows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def answer_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The tensors that the module returns, in order, with the names that it gives them; caches are left out."""
    return list(flattened(plain_call(module, tensors)))


def arrays_of(answer: Any) -> list[npt.NDArray[Any]]:
    """The tensors of an answer, in order, as arrays; bfloat16, which NumPy lacks, becomes float32."""
    tensors = (tensor.detach().cpu() for _, tensor in flattened(answer))
    return [(tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy() for tensor in tensors]


def flattened(answer: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, mappings and dataclasses; a name is empty where nothing gives one."""
    if isinstance(answer, Tensor):
        yield name, answer
    elif isinstance(answer, Mapping):
        for key, value in answer.items():
            yield from flattened(value, str(key))
    elif is_dataclass(answer) and not isinstance(answer, type):
        for one in fields(answer):
            yield from flattened(getattr(answer, one.name), one.name)
    elif hasattr(answer, "_asdict"):  # a named tuple
        yield from flattened(answer._asdict())
    elif isinstance(answer, (tuple, list)):
        for value in answer:
            yield from flattened(value)
