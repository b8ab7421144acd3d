"""State dicts of modules in packages: each tensor once, whatever names share it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.compress.modules.state_file import DTYPES, entry_of, lost_types, real_form, restored_type
from mnemos.errors import ConfigError, FormatError, ModelError
from mnemos.formats.mapping import excerpt
from mnemos.formats.package import METADATA, Package
from mnemos.formats.safetensors import SINGLE_NAME, open_safetensors
from mnemos.formats.safetensors_writer import write_safetensors

PICKLED_NAME = "model.pt"
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict. ModelError: it holds something else than tensors."""
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{name} in the module's state is a {type(value).__name__}; expected tensors only")
    return dict(state)


def write_state(module: nn.Module, path: Path) -> dict[str, Any]:
    """Writes the module's tensors, each once; returns what metadata.json says about them.

    `ties`: the further names of those that have several; `types`: those that the file loses. A path that ends in .pt
    gets the state dict as PyTorch writes it, for `weights_only=True`. ModelError: a tensor of a type that the file does
    not have.
    """
    state = state_of(module)
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        place = value.data_ptr(), value.shape, value.stride(), value.dtype
        owner = first.setdefault(place, name) if value.numel() else name
        if owner != name:
            ties[name] = owner
    if path.suffix == ".pt":
        try:
            torch.save({name: value.detach().cpu() for name, value in state.items()}, path)
        except RuntimeError as error:  # which PyTorch makes of what the system says
            raise FormatError(
                f"{path}: PyTorch cannot write it, for example because the disk is full: {error}"
            ) from error
        return {"ties": ties}
    real = {name: real_form(value) for name, value in state.items()}
    for name, value in real.items():
        if value.dtype not in DTYPES or value.layout is not torch.strided or value.is_meta:
            found = "on the meta device, without values" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise ModelError(f"{name} is {found}; expected {', '.join(map(str, DTYPES))}, dense")
    entries = {name: entry_of(value) for name, value in real.items() if name not in ties}
    write_safetensors(path, entries, {"format": "pt"})
    return {"ties": ties, "types": lost_types(state)}


def fill(module: nn.Module, package: Package) -> None:
    """Puts a package's tensors into a module, in the types in which they are stored, with the ties that it had.

    FormatError: the file is damaged; ConfigError: the module has other parameters than the one that was packed.
    """
    ties, types = (_names(package, field) for field in ("ties", "types"))
    if PICKLED_NAME in package.files:
        state = _read_pickled(package.path / PICKLED_NAME)
    else:
        state = _read(package.path / SINGLE_NAME, types)
    for name, owner in ties.items():
        if owner not in state:
            raise FormatError(f"{package.path / METADATA}: ties names {excerpt(owner)}, which the weights do not hold")
        state[name] = state[owner]
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            stored = state.get(name)
            if stored is not None and stored.dtype != tensor.dtype:
                tensor.data = tensor.data.to(stored.dtype)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"model_class made a {type(module).__name__} that the weights of {package.path} do not fit: {reason}; "
            "expected the class and the config that were packed"
        ) from error
    for name, owner in ties.items():
        _tie(module, name, owner)


def _tie(module: nn.Module, name: str, owner: str) -> None:
    """Makes a parameter the same object as another, where the class does not do so."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if name in parameters and owner in parameters and parameters[name] is not parameters[owner]:
        place, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(place), attribute, parameters[owner])


def _names(package: Package, field: str) -> dict[str, str]:
    """A field of metadata.json that gives tensors' names a text each."""
    found = package.metadata.get(field, {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise FormatError(f"{package.path / METADATA}: {field} is {excerpt(found)}; expected texts by tensors' names")
    return found


def _read(path: Path, types: Mapping[str, str]) -> dict[str, Tensor]:
    """A file's tensors, copied, in their types."""
    state = {}
    for name, stored in open_safetensors(path).items():
        values = torch.from_numpy(np.array(stored.data)).view(_DTYPES[stored.type.name]).view(stored.shape)
        try:
            state[name] = restored_type(values, types[name]) if name in types else values
        except ValueError as error:
            raise FormatError(f"{path}: {name}: {error}; expected what its package's metadata says") from error
    return state


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or a malicious pickle makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: is no state dict that runs nothing when it is read: {reason[:300]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"{path}: holds no state dict; expected tensors by their names")
    return dict(state)
