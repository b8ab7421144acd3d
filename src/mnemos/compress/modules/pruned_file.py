"""A pruned module's file: safetensors, with JSON in the header that says how the module differs from its class's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_sparse import BlockSparseLinear
from mnemos.compress.modules.kept_zeros import hold_zeros, is_held, mask_held
from mnemos.compress.modules.layers import is_transposed, matrix_of
from mnemos.compress.modules.module_file import entries_of, make_module, read_header, settings_of, tensors_of
from mnemos.compress.modules.state_file import entry_of
from mnemos.compress.modules.structured import Removed
from mnemos.errors import FormatError, ModelError
from mnemos.formats.mapping import excerpt
from mnemos.formats.safetensors import open_safetensors
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.models.foreign.signature import unwrap

NOTE = "mnemos.pruned_module"
_VERSION = 1
_MASK = ".pruning_mask"  # after a layer's name: its mask (out, in), eight weights a byte


@dataclass(frozen=True)
class Differences:
    """How a pruned module differs from one that its class makes, besides the sizes of its tensors.

    members  of lists of layers that lost some, by their name: which of the members before have stayed
    numbers  attributes that count something, (module, name, value), by the modules' names in the pruned one
    """

    members: dict[str, list[int]]
    numbers: list[tuple[str, str, int]]


class Before:
    """A module before it is pruned in place, to find `Differences` afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._members = {name: list(one) for name, one in _lists(model)}
        self._numbers = {id(module): _numbers(module) for module in model.modules()}

    def differences(self) -> Differences:
        """What has changed since."""
        members = {}
        for name, one in _lists(self.model):
            left = {id(member) for member in one}
            kept = [place for place, member in enumerate(self._members.get(name, [])) if id(member) in left]
            if len(kept) < len(self._members.get(name, [])):
                members[name] = kept
        numbers = [
            (name, attribute, value)
            for name, module in self.model.named_modules()
            for attribute, value in _numbers(module).items()
            if self._numbers.get(id(module), {}).get(attribute) != value
        ]
        return Differences(members, numbers)


@dataclass(frozen=True)
class StoredPruned:
    """What a file holds; `before`: the weights that each pruned layer had; `masked`: layers with masks, and whether the
    weight of each is stored transposed; `shapes`: of the weights of which only what the masks leave is stored."""

    path: Path
    class_name: str
    settings: dict[str, Any] | None
    differences: Differences
    removed: list[Removed]
    before: dict[str, int]
    layers: list[str]
    masked: dict[str, bool]
    shapes: dict[str, list[int]]
    aliases: dict[str, str]
    tensors: dict[str, Tensor]


def write_pruned(
    path: Path,
    module: nn.Module,
    differences: Differences,
    removed: Sequence[Removed],
    before: Mapping[str, int],
    layers: Sequence[str],
) -> None:
    """Writes a pruned module with the masks that it holds. FormatError: the file cannot be written."""
    tensors, aliases, types = entries_of(module)
    masked, shapes = {}, {}
    for name, mask in masks_of(module).items():
        layer = module.get_submodule(name)
        masked[name] = layer.transposed if isinstance(layer, BlockSparseLinear) else is_transposed(layer)
        packed = np.packbits(mask.cpu().numpy())
        tensors[name + _MASK] = Entry("U8", packed.shape, packed)
        key = f"{name}.weight" if name else "weight"
        if key in tensors:  # not another name of one that is stored
            weight = matrix_of(layer)
            shapes[key] = list(weight.shape)
            tensors[key] = entry_of(weight[mask])
    inner = unwrap(module)
    header = {
        "version": _VERSION,
        "class": type(inner).__name__,
        "transformers": settings_of(inner),
        "members": differences.members,
        "numbers": differences.numbers,
        "removed": [asdict(one) for one in removed],
        "before": dict(before),
        "layers": list(layers),
        "masked": masked,
        "shapes": shapes,
        "aliases": aliases,
        "types": types,
    }
    write_safetensors(path, tensors, {NOTE: json.dumps(header, separators=(",", ":"))})


def read_pruned(path: Path) -> StoredPruned:
    """Opens a file. FormatError: it is none of these, or damaged."""
    stored = open_safetensors(path)
    header = read_header(path, NOTE, _VERSION, "pruned", "PrunedModel.save")
    try:
        return StoredPruned(
            path,
            str(header["class"]),
            header["transformers"],
            Differences(
                {str(name): [int(one) for one in kept] for name, kept in header["members"].items()},
                [(str(module), str(name), int(value)) for module, name, value in header["numbers"]],
            ),
            [Removed(**one) for one in header["removed"]],
            {str(name): int(count) for name, count in header["before"].items()},
            [str(name) for name in header["layers"]],
            {str(name): bool(transposed) for name, transposed in header["masked"].items()},
            {str(name): [int(size) for size in shape] for name, shape in header["shapes"].items()},
            {str(alias): str(name) for alias, name in header["aliases"].items()},
            tensors_of(path, stored, dict(header.get("types", {}))),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {NOTE} lacks or misstates {excerpt(str(error))}; the file is damaged") from error


def restore_pruned(
    stored: StoredPruned, model_class: nn.Module | Callable[..., nn.Module] | None, arguments: Mapping[str, Any]
) -> nn.Module:
    """The pruned module. Errors: those of `make_module`, and ModelError for a class that does not fit the file."""
    module = make_module(stored, model_class, arguments)
    try:
        for name, kept in stored.differences.members.items():
            members = cast("nn.ModuleList | nn.Sequential", module.get_submodule(name))
            if len(members) == len(kept):  # a config of transformers says so already
                continue
            for place in reversed(range(len(members))):
                if place not in kept:
                    del members[place]
        for name, attribute, value in stored.differences.numbers:
            setattr(module.get_submodule(name), attribute, value)
        _take_tensors(module, stored)
        for name in stored.masked:
            layer = module.get_submodule(name)
            hold_zeros(layer, _mask(stored, name, matrix_of(layer).shape))
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{stored.path} does not fit a {type(unwrap(module)).__name__}: {error}") from error
    return module


def _take_tensors(module: nn.Module, stored: StoredPruned) -> None:
    """Gives the module the file's tensors; those of another size or type become new parameters."""
    own = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(_MASK)}
    for key, shape in stored.shapes.items():
        name = key.removesuffix("weight").removesuffix(".")
        whole = own[key].new_zeros(shape)
        whole[_mask(stored, name, whole.shape)] = own[key]
        own[key] = whole.T.contiguous() if stored.masked[name] else whole
    names: dict[str, list[str]] = {name: [name] for name in own}
    for alias, name in stored.aliases.items():
        names[name].append(alias)
    held = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in own.items():
        now = held.get(name)
        if now is None or (now.shape == tensor.shape and now.dtype == tensor.dtype):
            continue
        changed = nn.Parameter(tensor.clone(), requires_grad=now.requires_grad)
        for one in names[name]:
            owner, _, attribute = one.rpartition(".")
            setattr(module.get_submodule(owner), attribute, changed)
    state = own | {alias: own[name] for alias, name in stored.aliases.items()}
    module.load_state_dict(state)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a module's layers, (out, in) bool, by the layers' names."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BlockSparseLinear):
            masks[name] = layer.mask
        elif is_held(layer):
            masks[name] = mask_held(layer)
    return masks


def _mask(stored: StoredPruned, name: str, shape: torch.Size) -> Tensor:
    """A layer's mask, (out, in) as `shape` says. ValueError: the file has another size of it."""
    bits = np.unpackbits(stored.tensors[name + _MASK].numpy(), count=shape.numel())
    return torch.from_numpy(bits).bool().view(shape)


def _lists(model: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    return [(name, one) for name, one in model.named_modules() if isinstance(one, (nn.ModuleList, nn.Sequential))]


def _numbers(module: nn.Module) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}
