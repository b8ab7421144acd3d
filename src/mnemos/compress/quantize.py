"""Quantizes a model file: a plan, then one tensor after the other, in pieces of bounded size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.compress.calibration import Calibration
from mnemos.compress.mixes import MIXES
from mnemos.compress.packing import FORMATS
from mnemos.compress.plan import Override, Row, mix_named, plan
from mnemos.compress.search import DAMPING, Costs, is_searchable, search_rows
from mnemos.contract import Floats
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.blocks import encode_rows, unfit_because
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.formats.gguf import DEFAULT_ALIGNMENT, GGUFFile
from mnemos.formats.gguf_writer import GGUFWriter, RawValue, writing_gguf
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.hub.cache import Progress
from mnemos.models.conversion import Entry
from mnemos.models.gguf_form import gguf_form
from mnemos.models.llama_cpp import refused_because
from mnemos.version import __version__

Bytes = npt.NDArray[np.uint8]

PIECE = 1 << 24  # weights in memory at a time, as float32
QUANTIZATION_VERSION = 2  # of ggml's block formats, as `general.quantization_version`
_WIDE = (TensorType.F32, TensorType.F16, TensorType.BF16)  # what a quantized tensor may become without losing more
_WIDER = (TensorType.Q8_0, TensorType.BF16, TensorType.F32)  # tried in turn where a type cannot hold a tensor
_ADDED_METADATA = 1024  # bytes that are enough for what `_metadata` adds
_SPLIT = re.compile(r"split\.(no|count|tensors\.count)")


@dataclass(frozen=True)
class Importance:
    """How much the error of each input column counts, by tensor; `origin` is what it was measured on.

    values: float32 (columns,), or (experts, columns), by GGUF's names; tensors that are missing go without.
    """

    values: Mapping[str, Floats]
    origin: str


@dataclass(frozen=True)
class Quantized:
    """A file that was written, and what each of its tensors became."""

    path: Path
    type: str
    rows: Sequence[Row]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(row.bytes for row in self.rows)


def quantize_file(
    source: Path,
    out: Path,
    type: str,
    *,
    importance: Importance | None = None,
    search: Calibration | None = None,
    types: Mapping[str, TensorType] | None = None,
    overrides: Sequence[Override] = (),
    strict: bool = False,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Writes a GGUF file or Hugging Face folder to the GGUF file `out`, in one of the mixes of `compress.mixes`.

    importance        weighs the errors of the columns
    search            a calibration of this model, by whose second moments codes are searched (`compress.search`)
    types             of tensors by name, in place of those that the mix gives them (`compress.budget`)
    overrides         see `plan`
    strict            refuses a tensor that cannot have the type that the mix gives it, in place of the next better one
    allow_requantize  quantizes tensors that are quantized already, adding the second error to the first
    progress          called with (what, weights done, weights)

    `out` appears when it is whole. ConfigError, FormatError and UnsupportedError name the tensor and the reason.
    """
    mix_named(type)
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"out is {str(out)!r}, the model itself; give another file")
    checkpoint = open_checkpoint(source)
    model = model_of(checkpoint)
    because = None if checkpoint.kind == "gguf" else refused_because(model.metadata, model.tensors)
    if because is not None:
        warnings.warn(f"{source}: llama.cpp will not run the file, only Mnemos: {because}", stacklevel=2)
    return quantize_model(
        model,
        out,
        type,
        importance=importance,
        search=search,
        types=types,
        overrides=overrides,
        strict=strict,
        allow_requantize=allow_requantize,
        progress=progress,
    )


def quantize_model(
    model: Model,
    out: Path,
    type: str | None,
    *,
    importance: Importance | None = None,
    search: Calibration | None = None,
    types: Mapping[str, TensorType] | None = None,
    overrides: Sequence[Override] = (),
    strict: bool = False,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """`quantize_file` of a model that is open already; type None writes all tensors as they are stored."""
    if type is None:
        rows = [Row(name, tensor.shape, tensor.type, tensor.type) for name, tensor in model.tensors.items()]
        return _write_rows(model, _with_file_type(model, rows), rows, out, "as stored", None, None, strict, progress)
    name, mix = mix_named(type)
    rows = check_plan(
        model,
        type,
        calibrated=importance is not None,
        overrides=overrides,
        strict=strict and types is None,
        allow_requantize=allow_requantize,
    )
    if types is not None:
        rows = [
            replace(row, type=types[row.name], reason="") if row.name in types and row.reason != "by override" else row
            for row in rows
        ]
    if importance is not None:
        _check_importance(model.tensors, importance)
    metadata = _metadata(model.written, mix.number, name, importance, overrides)
    return _write_rows(model, metadata, rows, out, name, importance, search, strict, progress)


def check_plan(
    model: Model,
    type: str,
    *,
    calibrated: bool,
    overrides: Sequence[Override] = (),
    strict: bool = False,
    allow_requantize: bool = False,
) -> list[Row]:
    """The plan of `quantize_model`, with the errors that need nothing to be measured."""
    rows = plan(model.tensors, model.metadata, mix_named(type)[1], calibrated=calibrated, overrides=overrides)
    _check(rows, strict, allow_requantize)
    return rows


def _with_file_type(model: Model, rows: Sequence[Row]) -> Mapping[str, Any]:
    """The metadata to write, with the mix that the file is, if it is a plain one and nothing says so."""
    types = {row.type.name.lower() for row in rows if len(row.shape) > 1}
    mix = MIXES.get(types.pop()) if len(types) == 1 else None
    if mix is None or "general.file_type" in model.metadata:
        return model.written
    return {**model.written, "general.file_type": mix.number}


def _write_rows(
    model: Model,
    metadata: Mapping[str, Any],
    rows: Sequence[Row],
    out: Path,
    name: str,
    importance: Importance | None,
    search: Calibration | None,
    strict: bool,
    progress: Progress | None,
) -> Quantized:
    total = sum(tensor.size for tensor in model.tensors.values())
    searched = [row.name for row in rows if row.changes and row.type in FORMATS]
    written, done = [], 0
    with writing_gguf(out, metadata, [(row.name, row.shape) for row in rows]) as writer:
        for row in rows:
            if progress is not None:
                progress("quantizing", done, total)
            entry = model.tensors[row.name]
            tensor = entry if isinstance(entry, Tensor) else entry.load()
            moments = search.full_moments(row.name, searched) if search is not None and row.name in searched else None
            products = None if moments is None else moments.products
            written.append(_write(writer, tensor, row, importance, strict, products))
            done += tensor.size
    if progress is not None:
        progress("quantizing", total, total)
    return Quantized(out, name, written)


@dataclass(frozen=True)
class Model:
    """A model to be quantized: its metadata to read and to write, and its tensors, by GGUF's names."""

    metadata: Mapping[str, Any]
    written: Mapping[str, Any]
    tensors: Mapping[str, Tensor | Entry]


def open_model(source: Path) -> Model:
    """A GGUF file or a Hugging Face folder, in GGUF's form. Errors: those of `open_checkpoint` and `gguf_form`."""
    return model_of(open_checkpoint(source))


def model_of(checkpoint: Checkpoint, tokenizer: Path | None = None) -> Model:
    """An open checkpoint in GGUF's form; tokenizer: the folder of the one to store, None: the model's own."""
    if checkpoint.kind != "gguf":
        metadata, entries = gguf_form(checkpoint, tokenizer)
        return Model(metadata, metadata, entries)
    file = GGUFFile.open(checkpoint.path)
    stored = {k: RawValue(bytes(v)) for k, v in file.stored_metadata.items() if not _SPLIT.fullmatch(k)}
    return Model(file.metadata, stored, file.tensors)


def gguf_checkpoint(source: Path) -> Checkpoint:
    """The model at `source` as the checkpoint of a GGUF file, also where it is a Hugging Face folder."""
    model = open_model(source)
    tensors = {name: own if isinstance(own, Tensor) else own.load() for name, own in model.tensors.items()}
    return Checkpoint("gguf", source, model.metadata, tensors)


def unchanged_bytes(source: Path, quantized: Container[str]) -> int:
    """At most how many bytes a file has besides the tensors of these names: metadata, other tensors, alignment."""
    model = open_model(source)
    header = BytesIO()
    GGUFWriter(header, model.written, [(name, one.shape) for name, one in model.tensors.items()], DEFAULT_ALIGNMENT)
    kept = sum(
        one.type.row_bytes(one.shape[-1] if one.shape else 1) * prod(one.shape[:-1])
        for name, one in model.tensors.items()
        if name not in quantized
    )
    return header.tell() + kept + DEFAULT_ALIGNMENT * len(model.tensors) + _ADDED_METADATA


def _check(rows: Sequence[Row], strict: bool, allow_requantize: bool) -> None:
    again = [r for r in rows if r.changes and r.source.is_quantized and r.type not in _WIDE]
    if again and not allow_requantize:
        first = again[0]
        raise ConfigError(
            f"{first.name} is {first.source.name} already ({len(again)} of {len(rows)} tensors are quantized), and "
            f"{first.type.name} would add its error to that; start from the original model, or allow it "
            "(--allow-requantize)"
        )
    fallbacks = [r for r in rows if r.reason and r.reason != "by override"]
    if strict and fallbacks:
        first = fallbacks[0]
        raise ConfigError(
            f"{first.name} would be {first.type.name} ({len(fallbacks)} of {len(rows)} tensors cannot have the mix's "
            f"type): {first.reason}; choose another type, override them, or do without strict"
        )


def _check_importance(tensors: Mapping[str, Tensor | Entry], importance: Importance) -> None:
    known = [name for name in importance.values if name in tensors]
    if not known:
        example = next(iter(importance.values), "nothing")
        raise ConfigError(
            f"importance of {importance.origin} is for other tensors ({example}, ...); it fits none of these"
        )
    for name in known:
        tensor, size = tensors[name], importance.values[name].size
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if size not in (tensor.columns, tensor.columns * experts):
            raise ConfigError(
                f"importance of {importance.origin} has {size} values for {name}, whose rows have {tensor.columns}: "
                "it was measured on another model"
            )


def _metadata(
    source: Mapping[str, Any], number: int, name: str, importance: Importance | None, overrides: Sequence[Override]
) -> dict[str, Any]:
    metadata = dict(source)
    metadata["general.quantization_version"] = QUANTIZATION_VERSION
    metadata["general.file_type"] = number
    made = [name, *(f"{pattern}={type_.name.lower()}" for pattern, type_ in overrides)]
    if importance is not None:
        made.append(f"importance of {importance.origin}")
        metadata["quantize.imatrix.dataset"] = importance.origin
        metadata["quantize.imatrix.entries_count"] = len(importance.values)
    metadata["mnemos.quantized"] = f"{', '.join(made)} (Mnemos {__version__})"
    return metadata


def _write(
    writer: GGUFWriter,
    tensor: Tensor,
    row: Row,
    importance: Importance | None,
    strict: bool,
    products: Floats | None,
) -> Row:
    """Writes a tensor in its row's type, or in one that can hold it; returns what it became."""
    if not row.changes:
        writer.write(row.name, row.type, [tensor.data])
        return row
    weights = importance.values.get(row.name) if importance is not None else None
    problem = ""
    for type_ in (row.type, *([] if strict else _wider(row.type, tensor.columns))):
        try:
            writer.write(row.name, type_, encoded(tensor, type_, weights, products))
            return row if type_ is row.type else replace(row, type=type_, reason=problem)
        except Unfit as error:
            if error.hopeless:
                raise FormatError(f"{row.name}: {error}") from None
            problem = problem or str(error)
    raise FormatError(f"{row.name}: {problem}")


def _wider(type: TensorType, columns: int) -> list[TensorType]:
    """The types with more bits that hold larger values, for rows of `columns`."""

    def bits(t: TensorType) -> float:
        return 8 * t.block[1] / t.block[0]

    return [t for t in _WIDER if bits(t) > bits(type) and columns % t.block[0] == 0]


class Unfit(Exception):
    """A row that a type cannot hold; hopeless if no type can."""

    def __init__(self, problem: str, hopeless: bool) -> None:
        super().__init__(problem)
        self.hopeless = hopeless


def encoded(
    tensor: Tensor, type: TensorType, importance: Floats | None, products: Floats | None = None
) -> Iterator[Bytes]:
    """The tensor's bytes in another type, (rows, bytes per row) at a time, of about PIECE weights.

    products: those of `Moments`, by which the codes are searched where that is possible.
    """
    columns = tensor.columns
    parts = len(products) if products is not None else tensor.shape[0] if len(tensor.shape) == 3 else 1
    per_part = tensor.rows // parts
    weights = None if importance is None else np.broadcast_to(importance.reshape(-1, columns), (parts, columns))
    step = max(1, PIECE // columns)
    for part in range(parts):
        costs = None if products is None else Costs.of(products[part], _damping(tensor))
        end = (part + 1) * per_part
        for start in range(part * per_part, end, step):
            values = tensor.slice_rows(start, min(start + step, end)).dequantize()
            if costs is not None and is_searchable(values, type):
                yield search_rows(values, type, costs)
                continue
            out = np.empty((len(values), type.row_bytes(columns)), dtype=np.uint8)
            failed = encode_rows(values, type, None if weights is None else weights[part], out)
            if failed >= 0:
                problem = unfit_because(values[failed], type)
                raise Unfit(f"row {start + failed} {problem}", not np.isfinite(values[failed]).all())
            yield out


def _damping(tensor: Tensor) -> float:
    """An embedding that is the head as well is also read row by row, where every column counts alike."""
    return 1.0 if tensor.name == "token_embd.weight" else DAMPING
