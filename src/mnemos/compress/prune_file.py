"""Removes feed-forward neurons and attention heads from GGUF files: what goes is measured on a text.

As `compress.modules.structured`, for files: rows that stay are copied as they are stored; the matrices that read what
is left are fitted anew and stored once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.compress.calibration import Moments, Report, moments
from mnemos.contract import Floats
from mnemos.errors import ConfigError, MissingDependencyError, UnsupportedError
from mnemos.formats.blocks import encode
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import RawValue, writing_gguf
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.rules import real

FITTED_TYPE = TensorType.Q8_0  # of fitted weights that were quantized, where their rows are whole blocks
SHARE = real(0, 1, open_high=True)


@dataclass(frozen=True)
class Group:
    """The neurons or heads of one layer: `count` units, each `size` columns of the reader.

    rows    of each tensor that writes to them, the number of consecutive rows in a unit
    """

    kind: str
    reader: str
    count: int
    size: int
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Pruned:
    """What became of one group: how many units it had and has."""

    name: str
    kind: str
    before: int
    after: int


def prune_file(
    source: Path, out: Path, text: str, *, neurons: float = 0.0, heads: float = 0.0, progress: Report | None = None
) -> list[Pruned]:
    """Writes the GGUF file `out`: `source` without these shares of each layer's feed-forward neurons and heads.

    text: on which the layers' inputs are measured. Heads go with the keys and values that they share. The same number
    stays in each layer. `out` appears when it is whole.
    Errors: ConfigError for shares or a text that will not do, UnsupportedError for a model without such layers.
    """
    shares = {"neurons": SHARE.apply("neurons", neurons), "heads": SHARE.apply("heads", heads)}
    if not any(shares.values()):
        raise ConfigError("neurons and heads are 0; expected a share of one of them above 0 and below 1")
    checkpoint = open_checkpoint(source)
    if checkpoint.kind != "gguf":
        raise UnsupportedError(f"{source}: is no GGUF file; a folder's module is pruned with PrunedModel")
    file = GGUFFile.open(checkpoint.path)
    if out.exists() and out.samefile(file.path):
        raise ConfigError(f"out is {str(out)!r}, the model itself; give another file")
    groups = [group for group in _groups(file) if shares[group.kind]]
    for kind, share in shares.items():
        if share and not any(group.kind == kind for group in groups):
            raise UnsupportedError(
                f"{source}: has no {kind} that can be removed; a decoder with plain layers is needed"
            )
    readers = {group.reader for group in groups}
    measured = moments(file.path, text, full=readers.__contains__, progress=progress)
    changed: dict[str, Tensor] = {}
    done = []
    for number, group in enumerate(groups):
        if progress is not None:
            progress("fitting", number, len(groups))
        kept = _shrink(file.tensors, group, shares[group.kind], measured[group.reader], changed)
        done.append(Pruned(group.reader, group.kind, group.count, kept))
    if progress is not None:
        progress("fitting", len(groups), len(groups))
    metadata = _metadata(file, done)
    tensors = [changed.get(name, tensor) for name, tensor in file.tensors.items()]
    with writing_gguf(out, metadata, [(tensor.name, tensor.shape) for tensor in tensors]) as writer:
        for tensor in tensors:
            writer.write(tensor.name, tensor.type, [tensor.data])
    return done


def _groups(file: GGUFFile) -> list[Group]:
    """What can be removed from each layer."""
    name = file.metadata["general.architecture"]
    heads, kv_heads = (_number(file, f"{name}.attention.head_count{suffix}") for suffix in ("", "_kv"))
    kv_heads = kv_heads or heads
    found = []
    tensors = file.tensors
    for layer in range(_number(file, f"{name}.block_count")):
        down, up = (tensors.get(f"blk.{layer}.ffn_{part}.weight") for part in ("down", "up"))
        if down is not None and up is not None and len(down.shape) == 2 and up.shape[0] == down.shape[1]:
            writers = [f"blk.{layer}.ffn_{part}.{kind}" for part in ("gate", "up") for kind in ("weight", "bias")]
            rows = {writer: 1 for writer in writers if writer in tensors}
            found.append(Group("neurons", down.name, down.shape[1], 1, rows))
        output = tensors.get(f"blk.{layer}.attn_output.weight")
        parts = [f"blk.{layer}.attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")]
        norm = tensors.get(f"blk.{layer}.attn_q_norm.weight")
        together = norm is not None and output is not None and norm.size == output.shape[1]  # of all heads, not of each
        if output is not None and kv_heads > 1 and parts[0] in tensors and not together:
            size = output.shape[1] // kv_heads
            rows = {part: tensors[part].shape[0] // kv_heads for part in parts if part in tensors}
            found.append(Group("heads", output.name, kv_heads, size, rows))
    return found


def _number(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    if not isinstance(value, (int, np.integer)):
        raise UnsupportedError(
            f"{file.path}: {key} is {str(value)[:60]}; only models with the same in each layer can be pruned"
        )
    return int(value)


def _shrink(
    tensors: Mapping[str, Tensor], group: Group, share: float, measured: Moments, changed: dict[str, Tensor]
) -> int:
    """Puts a group's smaller tensors into `changed`; returns how many units stay."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("pruning needs PyTorch: pip install 'mnemos[torch]'") from error
    from mnemos.compress.modules.moments import Moments as Inputs
    from mnemos.compress.modules.structured import choose_and_fit, kept_count
    from mnemos.compress.modules.units import Units

    assert measured.products is not None
    reader = tensors[group.reader]
    units = Units(group.reader, group.size, group.count, {})
    count = kept_count(units, share)
    second = torch.from_numpy(measured.products.mean(axis=0))  # of all equal parts of the rows; here there is one
    inputs = Inputs(torch.zeros(len(second)), second, measured.tokens)
    kept, fitted, _ = choose_and_fit(torch.from_numpy(reader.dequantize()), inputs, units, count, has_bias=False)
    index: npt.NDArray[np.intp] = kept.numpy().nonzero()[0]
    for name, rows in group.rows.items():
        tensor = tensors[name]
        if len(tensor.shape) == 1:
            values = tensor.dequantize().reshape(-1, rows)[index].reshape(-1)
            changed[name] = Tensor.from_array(name, values)
        else:
            changed[name] = tensor.take_rows((index[:, None] * rows + np.arange(rows)).reshape(-1))
    changed[reader.name] = _stored(reader, np.ascontiguousarray(fitted.numpy()))
    return count


def _stored(tensor: Tensor, values: Floats) -> Tensor:
    """Fitted values in the tensor's type, or in one that keeps them better."""
    type_ = tensor.type
    if type_.is_quantized:
        type_ = FITTED_TYPE if values.shape[1] % FITTED_TYPE.block[0] == 0 else TensorType.F16
    return replace(tensor, type=type_, shape=values.shape, data=encode(values, type_))


def _metadata(file: GGUFFile, done: list[Pruned]) -> dict[str, Any]:
    name = file.metadata["general.architecture"]
    metadata: dict[str, Any] = {
        key: RawValue(bytes(stored)) for key, stored in file.stored_metadata.items() if not key.startswith("split.")
    }
    for one in done:
        if one.kind == "neurons":
            metadata[f"{name}.feed_forward_length"] = one.after
            continue
        heads, kv_heads = (_number(file, f"{name}.attention.head_count{suffix}") for suffix in ("", "_kv"))
        width = file.metadata.get(f"{name}.attention.key_length") or _number(file, f"{name}.embedding_length") // heads
        metadata[f"{name}.attention.head_count"] = heads * one.after // one.before
        metadata[f"{name}.attention.head_count_kv"] = (kv_heads or heads) * one.after // one.before
        metadata[f"{name}.attention.key_length"] = metadata[f"{name}.attention.value_length"] = int(width)
        metadata.setdefault(f"{name}.rope.dimension_count", int(width))
    metadata["mnemos.pruned"] = ", ".join(
        f"{kind} {sorted({(one.before, one.after) for one in done if one.kind == kind})}"
        for kind in dict.fromkeys(one.kind for one in done)
    )
    return metadata
