"""What the files of changed modules have in common: the module's state, and how a module like it is made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.compress.modules.state_file import DTYPES, entry_of, lost_types, real_form, restored_type
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, ModelError, shown
from mnemos.formats.mapping import excerpt
from mnemos.formats.safetensors import read_notes
from mnemos.formats.safetensors_writer import Entry
from mnemos.formats.strict_json import parse_json_object

_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Stored(Protocol):
    """A file's module: its class's name and, of transformers' models, the class and config; see `settings_of`."""

    @property
    def path(self) -> Path: ...

    @property
    def class_name(self) -> str: ...

    @property
    def settings(self) -> dict[str, Any] | None: ...


def entries_of(module: nn.Module) -> tuple[dict[str, Entry], dict[str, str], dict[str, str]]:
    """(a module's tensors, each once; further names of some of them; the types that the file loses, see
    `state_file.lost_types`). ModelError for what a file cannot hold."""
    tensors: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    types: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} in the module's state is a {type(tensor).__name__}; expected tensors only")
        types |= lost_types({name: tensor})
        tensor = real_form(tensor)
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        if tensor.dtype not in DTYPES:
            raise ModelError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        tensors[name] = entry_of(tensor)
    return tensors, aliases, types


def read_header(path: Path, note: str, version: int, kind: str, writer: str) -> dict[str, Any]:
    """What the file of a changed module says of it. FormatError: it is none of the `kind` that `writer` has written."""
    text = read_notes(path).get(note)
    if text is None:
        raise FormatError(f"{path}: is no {kind} module; expected a file that {writer} has written")
    header = parse_json_object(text.encode(), f"{path}: {note}")
    if header.get("version") != version:
        raise FormatError(f"{path}: version is {excerpt(header.get('version'))}; this release reads {version}")
    return header


def make_module(
    stored: Stored, model_class: nn.Module | Callable[..., nn.Module] | None, arguments: Mapping[str, Any]
) -> nn.Module:
    """The module that a file's weights go into; its own values do not matter.

    ConfigError: there is no way to make it, or `model_class` makes something else. FormatError: transformers does not
    have the file's class. MissingDependencyError: transformers is not installed.
    """
    if isinstance(model_class, nn.Module):
        if arguments:
            raise ConfigError(f"{', '.join(arguments)} given with a module; expected a class to call with them")
        return _with_values(model_class)
    if model_class is not None:
        if not callable(model_class):
            raise ConfigError(f"model_class is {shown(model_class)}; expected a class, or a module of it")
        made = _called(model_class, arguments)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"model_class made a {type(made).__name__}; expected a torch.nn.Module")
        return _with_values(made)
    if stored.settings is None:
        raise ConfigError(
            f"model_class is None and {stored.path} holds a {stored.class_name}; expected the class, "
            f"load(path, model_class={stored.class_name}), or a module of it"
        )
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"{stored.path} holds transformers' {stored.class_name}; pip install 'mnemos[torch]'"
        ) from error
    found = getattr(transformers, str(stored.settings.get("class")), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise FormatError(f"{stored.path}: transformers has no model {excerpt(stored.settings.get('class'))}")
    config_class: Any = found.config_class
    module: nn.Module = found(config_class.from_dict(stored.settings.get("config")))
    return module


def _called(model_class: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    signature = inspect.signature(model_class)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        name = getattr(model_class, "__name__", "model_class")
        given = ", ".join(arguments) or "no arguments"
        raise ConfigError(
            f"{name}{signature} cannot be called with {given}: {error}; expected them beside the path, as in "
            f"load(path, model_class={name}, width=64), or a module as model_class"
        ) from error
    return model_class(**arguments)


def _with_values(module: nn.Module) -> nn.Module:
    """The module. ConfigError: it has a tensor without values, which may be one that no file holds."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(f"{name} of the module to load into is on the device meta; expected it on 'cpu'")
    return module


def settings_of(module: nn.Module) -> dict[str, Any] | None:
    """The class and config of a model of transformers' own, from which it can be made again."""
    if not type(module).__module__.startswith("transformers.models."):
        return None
    config: Any = module.config
    return {"class": type(module).__name__, "config": json.loads(config.to_json_string(use_diff=False))}


def tensors_of(path: Path, stored: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Tensor]:
    """PyTorch's view of a file's tensors. Its pages are private: PyTorch knows no tensor that cannot be written to.

    types: those that `entries_of` returned. ValueError: a tensor cannot be of its type.
    """
    content = np.memmap(path, dtype=np.uint8, mode="c")
    start = len(content) - sum(len(one.data) for one in stored.values())
    addresses = {name: one.data.ctypes.data for name, one in stored.items() if len(one.data)}
    base = min(addresses.values(), default=0)
    tensors = {}
    for name, one in stored.items():
        begin = start + addresses.get(name, base) - base
        flat = torch.from_numpy(content[begin : begin + len(one.data)])
        dtype = _BY_NAME[one.type.name]
        aligned = flat if begin % dtype.itemsize == 0 else flat.clone()
        tensor = aligned.view(dtype).view(one.shape)
        tensors[name] = restored_type(tensor, types[name]) if name in types else tensor
    return tensors
