"""PyTorch's .pt files, read without ever running what they contain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, MissingDependencyError
from mnemos.formats.tensor import Tensor, unwrapped
from mnemos.formats.tensor_types import TensorType

# A class that only holds hyperparameters, as training scripts pickle them: module.path.ModelArgs and the like.
_PLAIN_DATA = re.compile(
    r"(?!(builtins|os|posix|nt|sys|subprocess|shutil|torch|numpy)\b)[\w.]+\.\w*(Args|Config|Params)"
)
_TYPES = {
    "float32": TensorType.F32,
    "float16": TensorType.F16,
    "bfloat16": TensorType.BF16,
    "float64": TensorType.F64,
    "int8": TensorType.I8,  # codes of quantized banks
}
_STATE_NAMES = ("model", "state_dict", "model_state_dict")
_ARGUMENT_NAMES = ("model_args", "args", "config", "hyperparameters")


class PlainData:
    """Stands in for a foreign dataclass: takes over its fields and has no behaviour."""


@dataclass(frozen=True)
class PickledState:
    """The tensors of a state dict, and the hyperparameters saved beside it (empty for a plain state dict)."""

    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_pickled(path: str | Path) -> PickledState:
    """Reads {'model': state dict, 'model_args': hyperparameters} or a plain state dict, with weights_only=True.

    A pickle that names anything but tensors, plain containers and a class of hyperparameters (whose fields alone are
    taken) is refused: FormatError with the name. MissingDependencyError without PyTorch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("reading a .pt file needs PyTorch: pip install 'mnemos[torch]'") from error
    path = Path(path)
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in wanted if not _PLAIN_DATA.fullmatch(name)]
        if refused:
            raise FormatError(
                f"{path}: the pickle wants to run {', '.join(map(repr, refused))}, which is refused; expected tensors "
                "and plain values: save a state dict with torch.save(model.state_dict(), ...) or safetensors"
            )
        with torch.serialization.safe_globals([(PlainData, name) for name in wanted]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FormatError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path}: cannot be read as a PyTorch checkpoint: {reason}") from error
    return _sort_out(path, content)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _sort_out(path: Path, content: Any) -> PickledState:
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise FormatError(f"{path}: holds a {kind}; expected a state dict, or a dict with one as 'model'")
    state: Any = next((content[name] for name in _STATE_NAMES if isinstance(content.get(name), Mapping)), content)
    arguments: Any = next((content[name] for name in _ARGUMENT_NAMES if state is not content and name in content), {})
    if isinstance(arguments, PlainData):
        arguments = vars(arguments)
    if not isinstance(arguments, Mapping):
        raise FormatError(f"{path}: model_args is a {type(arguments).__name__}; expected names and values")
    import torch

    tensors = {
        name: _wrap(name, value)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_complex()
    }
    if not tensors:
        raise FormatError(f"{path}: holds no tensors under names; expected a state dict, or a dict with one as 'model'")
    return PickledState({str(name): value for name, value in arguments.items()}, unwrapped(tensors))


def _wrap(name: str, value: Any) -> Tensor:
    import torch

    kind = _TYPES.get(str(value.dtype).removeprefix("torch."))
    value = value.detach().contiguous()
    if kind is None:
        value, kind = value.to(torch.float32), TensorType.F32
    data = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.zeros(0, dtype=np.uint8)
    return Tensor(name, kind, tuple(value.shape), data)
