"""A module's state dict as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mnemos.errors import ConfigError
from mnemos.formats.safetensors_writer import Entry, write_safetensors
from mnemos.formats.whole_file import late_errors, write_whole

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def entry_of(tensor: Tensor) -> Entry:
    """A tensor as the safetensors writer takes it. KeyError for a dtype that the format does not have."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return Entry(DTYPES[tensor.dtype], tuple(tensor.shape), flat)


def _save(state: Mapping[str, Tensor], file: BinaryIO) -> None:
    with late_errors(file) as patient:
        torch.save(dict(state), patient)


# Types that a file has not, or that its reader gives back as others.
_LOST = {torch.bool: "bool", torch.complex64: "complex64", torch.complex128: "complex128"}


def lost_types(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of the types that `restored_type` must be told, by tensor."""
    return {name: _LOST[value.dtype] for name, value in state.items() if value.dtype in _LOST}


def real_form(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of floats, (..., 2); any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def restored_type(tensor: Tensor, kind: str) -> Tensor:
    """A tensor of a file in its type, one of those of `lost_types`. ValueError: it cannot be."""
    if kind == "bool":
        return tensor.bool()
    if kind not in _LOST.values() or tensor.shape[-1:] != (2,) or not tensor.is_floating_point():
        raise ValueError(f"a tensor of type {str(kind)[:40]!r} is {tensor.dtype} {tuple(tensor.shape)}")
    return torch.view_as_complex(tensor.contiguous())


def check_name(path: str | os.PathLike[str]) -> None:
    """ConfigError for a file's name that `save_state` does not write to."""
    if Path(path).suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ConfigError(f"output_path is {os.fspath(path)!r}; its suffix must be .safetensors, .pt, .pth or .bin")


def save_state(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict as safetensors, or as PyTorch's own format where the name ends in .pt, .pth or .bin.

    ConfigError: it ends otherwise, see `check_name`. FormatError, CapacityError: the file cannot be written; then
    nothing has changed.
    """
    check_name(path)
    target = Path(path)
    if target.suffix == ".safetensors":
        write_safetensors(target, {name: entry_of(value) for name, value in state.items()}, {"format": "pt"})
    else:
        size = sum(value.nbytes for value in state.values())
        write_whole(target, lambda file: _save(state, file), size)
