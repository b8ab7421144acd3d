"""A quantized module's file: safetensors, with JSON in the header that says what each layer is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.block_weights import BLOCK, TYPES, BlockWeights
from mnemos.compress.modules.module_file import entries_of, read_header, settings_of, tensors_of
from mnemos.compress.modules.quantized_layers import QuantizedEmbedding, QuantizedLinear
from mnemos.compress.modules.report import LayerReport
from mnemos.errors import FormatError
from mnemos.formats.mapping import excerpt
from mnemos.formats.safetensors import open_safetensors
from mnemos.formats.safetensors_writer import write_safetensors
from mnemos.models.foreign.signature import unwrap

NOTE = "mnemos.quantized_module"
_VERSION = 1
_PARTS = ("codes", "scales", "row_scales", "minima", "row_minima")


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
        codes, row_scales = parts[0], parts[2]
        blocks = -(-layer.columns // BLOCK)
        known = codes is not None and codes.dim() in (2, 3) and row_scales is not None
        if layer.bits not in TYPES or layer.columns < 1 or not known:
            raise FormatError(f"{self.path}: layer {excerpt(layer.name)} has no codes of a known kind")
        assert codes is not None and row_scales is not None
        rows = len(row_scales)
        uint8, int8, bfloat16 = torch.uint8, torch.int8, torch.bfloat16
        stored = (rows, blocks) if codes.dim() == 3 else (len(codes),)
        shapes = [((*stored, 4 * layer.bits), uint8), ((rows, blocks), uint8), ((rows,), bfloat16)]
        shapes += [((rows, blocks), int8), ((rows,), bfloat16)] if layer.bits != 8 else []
        for part, tensor, (shape, dtype) in zip(_PARTS, parts, shapes, strict=False):
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype is not dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise FormatError(f"{self.path}: {_key(layer.owner, part)} is {found}; expected {dtype} {shape}")
        held: list[Any] = [*parts[: len(shapes)], None, None][:5]
        if not bool(held[2].isfinite().all()) or (held[4] is not None and not bool(held[4].isfinite().all())):
            raise FormatError(f"{self.path}: {_key(layer.owner, 'row_scales')} or row_minima holds NaN or infinity")
        weights = BlockWeights(layer.bits, layer.columns, *held)
        if codes.dim() == 2 and len(codes) != int(weights.has_values().sum()):
            raise FormatError(
                f"{self.path}: {_key(layer.owner, 'codes')} has {len(codes)} blocks; its scales need "
                f"{int(weights.has_values().sum())}"
            )
        return weights

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
    tensors, aliases, types = entries_of(module)
    header = {
        "version": _VERSION,
        "bits": bits,
        "method": method,
        "class": type(inner).__name__,
        "transformers": settings_of(inner),
        "layers": [asdict(layer) for layer in layers],
        "reports": [asdict(row) for row in reports],
        "aliases": aliases,
        "types": types,
    }
    write_safetensors(path, tensors, {NOTE: json.dumps(header, separators=(",", ":"))})


def read_model(path: Path) -> StoredModel:
    """Opens a file. FormatError: it is none of these, or damaged."""
    stored = open_safetensors(path)
    header = read_header(path, NOTE, _VERSION, "quantized", "QuantizedModel.save")
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
            tensors_of(path, stored, dict(header.get("types", {}))),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {NOTE} lacks or misstates {excerpt(str(error))}; the file is damaged") from error


def _key(owner: str, part: str) -> str:
    return f"{owner}.quantized.{part}" if owner else f"quantized.{part}"
