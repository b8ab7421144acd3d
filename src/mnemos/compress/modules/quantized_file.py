"""A quantized module's file: safetensors, with JSON in the header that says what each layer is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_weights import BLOCK, TYPES, BlockWeights
from mnemos.compress.modules.quantized_layers import QuantizedEmbedding, QuantizedLinear
from mnemos.compress.modules.report import LayerReport
from mnemos.compress.modules.state_file import DTYPES, entry_of
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, ModelError
from mnemos.formats.mapping import excerpt
from mnemos.formats.safetensors import open_safetensors, read_notes
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.formats.strict_json import parse_json_object
from mnemos.models.foreign.signature import unwrap

NOTE = "mnemos.quantized_module"
_VERSION = 1
_PARTS = ("codes", "scales", "row_scales", "minima", "row_minima")
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer of a file. owner: the layer under whose name its weights are; others may share them."""

    name: str
    kind: str
    owner: str
    bits: int
    columns: int
    precise: bool


@dataclass(frozen=True)
class StoredModel:
    """What a file holds.

    settings: of transformers' models, their class's name and config; aliases: further names of tensors, as in the
    module's state dict; tensors: views of the file, which nothing writes to.
    """

    path: Path
    bits: int
    method: str
    class_name: str
    settings: dict[str, Any] | None
    layers: list[StoredLayer]
    reports: list[LayerReport]
    aliases: dict[str, str]
    tensors: dict[str, Tensor]

    def weights(self, layer: StoredLayer) -> BlockWeights:
        """A layer's weights, checked. FormatError: a part is missing or has another shape."""
        parts = [self.tensors.get(_key(layer.owner, part)) for part in _PARTS]
        codes = parts[0]
        blocks = -(-layer.columns // BLOCK)
        if layer.bits not in TYPES or layer.columns < 1 or codes is None or codes.dim() != 3:
            raise FormatError(f"{self.path}: layer {excerpt(layer.name)} has no codes of a known kind")
        rows = len(codes)
        uint8, int8, bfloat16 = torch.uint8, torch.int8, torch.bfloat16
        shapes = [((rows, blocks, 4 * layer.bits), uint8), ((rows, blocks), uint8), ((rows,), bfloat16)]
        shapes += [((rows, blocks), int8), ((rows,), bfloat16)] if layer.bits != 8 else []
        for part, tensor, (shape, dtype) in zip(_PARTS, parts, shapes, strict=False):
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype is not dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise FormatError(f"{self.path}: {_key(layer.owner, part)} is {found}; expected {dtype} {shape}")
        held: list[Any] = [*parts[: len(shapes)], None, None][:5]
        if not bool(held[2].isfinite().all()) or (held[4] is not None and not bool(held[4].isfinite().all())):
            raise FormatError(f"{self.path}: {_key(layer.owner, 'row_scales')} or row_minima holds NaN or infinity")
        return BlockWeights(layer.bits, layer.columns, *held)

    def floats(self) -> dict[str, Tensor]:
        """The other tensors, by all of their names in the module's state dict."""
        own = {name: tensor for name, tensor in self.tensors.items() if ".quantized." not in f".{name}"}
        return own | {alias: own[name] for alias, name in self.aliases.items() if name in own}


def write_model(path: Path, module: nn.Module, bits: int, method: str, reports: Sequence[LayerReport]) -> None:
    """Writes a module with quantized layers. FormatError: the file cannot be written."""
    owners: dict[int, str] = {}
    layers = []
    for name, layer in module.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            weight = layer.quantized
            owner = owners.setdefault(id(weight), name)
            kind = "embedding" if isinstance(layer, QuantizedEmbedding) else "linear"
            precise = isinstance(layer, QuantizedLinear) and layer.precise
            layers.append(StoredLayer(name, kind, owner, weight.bits, weight.columns, precise))
    inner = unwrap(module)
    aliases: dict[str, str] = {}
    header = {
        "version": _VERSION,
        "bits": bits,
        "method": method,
        "class": type(inner).__name__,
        "transformers": _transformers_settings(inner),
        "layers": [asdict(layer) for layer in layers],
        "reports": [asdict(row) for row in reports],
        "aliases": aliases,
    }
    tensors: dict[str, Entry] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} in the module's state is a {type(tensor).__name__}; expected tensors only")
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        if tensor.dtype not in DTYPES:
            raise ModelError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        tensors[name] = entry_of(tensor)
    write_safetensors(path, tensors, {NOTE: json.dumps(header, separators=(",", ":"))})


def read_model(path: Path) -> StoredModel:
    """Opens a file. FormatError: it is none of these, or damaged."""
    stored = open_safetensors(path)
    note = read_notes(path).get(NOTE)
    if note is None:
        raise FormatError(f"{path}: is no quantized module; expected a file that QuantizedModel.save has written")
    header = parse_json_object(note.encode(), f"{path}: {NOTE}")
    if header.get("version") != _VERSION:
        raise FormatError(f"{path}: version is {excerpt(header.get('version'))}; this release reads {_VERSION}")
    try:
        return StoredModel(
            path,
            int(header["bits"]),
            str(header["method"]),
            str(header["class"]),
            header["transformers"],
            [StoredLayer(**layer) for layer in header["layers"]],
            [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in header["reports"]],
            {str(alias): str(name) for alias, name in header["aliases"].items()},
            _as_tensors(path, stored),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {NOTE} lacks or misstates {excerpt(str(error))}; the file is damaged") from error


def make_module(
    stored: StoredModel, model_class: nn.Module | Callable[..., nn.Module] | None, arguments: Mapping[str, Any]
) -> nn.Module:
    """The float module that a file's weights go into; its own values do not matter."""
    if isinstance(model_class, nn.Module):
        if arguments:
            raise ConfigError(f"{', '.join(arguments)} given with a module; expected a class to call with them")
        return model_class
    if model_class is not None:
        made = model_class(**arguments)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"model_class made a {type(made).__name__}; expected a torch.nn.Module")
        return made
    if stored.settings is None:
        raise ConfigError(
            f"model_class is None and {stored.path} holds a {stored.class_name}; expected the class, "
            f"QuantizedModel.load(path, model_class={stored.class_name}), or a module of it"
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


def _transformers_settings(module: nn.Module) -> dict[str, Any] | None:
    """The class and config of a model of transformers' own, from which it can be made again."""
    if not type(module).__module__.startswith("transformers.models."):
        return None
    config: Any = module.config
    return {"class": type(module).__name__, "config": json.loads(config.to_json_string(use_diff=False))}


def _as_tensors(path: Path, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """PyTorch's view of a file's tensors. Its pages are private: PyTorch knows no tensor that cannot be written to."""
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
        tensors[name] = aligned.view(dtype).view(one.shape)
    return tensors


def _key(owner: str, part: str) -> str:
    return f"{owner}.quantized.{part}" if owner else f"quantized.{part}"
