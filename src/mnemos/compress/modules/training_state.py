"""Checkpoints of a training: what is needed to go on as if nothing had happened.

A checkpoint is a folder `step-N` with the student's and the optimizer's tensors (safetensors) and a JSON file. It is
written under another name and renamed when it is whole, so that what is found is never half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import FormatError, MissingDependencyError, MnemosError
from mnemos.formats.strict_json import read_json_object
from mnemos.formats.whole_file import not_written

_NAME = re.compile(r"step-(\d+)")
STUDENT, OPTIMIZER, STATE = "student.safetensors", "optimizer.safetensors", "state.json"


def save_training(
    folder: Path, step: int, student: nn.Module, optimizer: torch.optim.Optimizer, notes: dict[str, Any]
) -> Path:
    """Writes the checkpoint of a step and removes the one before; `notes` are JSON. Errors: those of `not_written`."""
    folder.mkdir(parents=True, exist_ok=True)
    target, draft = folder / f"step-{step:08}", folder / f".step-{step:08}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        tensors, numbers = _flat(optimizer.state_dict()["state"])
        groups = [
            {name: value for name, value in group.items() if _is_plain(value)}
            for group in optimizer.state_dict()["param_groups"]
        ]
        tensors["random"] = torch.get_rng_state()
        _save(draft / STUDENT, _own_tensors(student))
        _save(draft / OPTIMIZER, tensors)
        state = {"step": step, "numbers": numbers, "groups": groups, **notes}
        _write(draft / STATE, json.dumps(state, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, MnemosError):
            raise not_written(target, error) from error
        raise
    for other in _found(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load_training(folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Sets student, optimizer and random numbers to the latest checkpoint and returns its notes; None: there is none.

    FormatError: it is of another student, or damaged.
    """
    found = _found(folder)
    if not found:
        return None
    latest = found[-1]
    state = read_json_object(latest / STATE)
    held, stored = _own_tensors(student), _load(latest / STUDENT)
    wrong = [name for name in held.keys() | stored.keys() if _shape(held.get(name)) != _shape(stored.get(name))]
    if wrong:
        name = sorted(wrong)[0]
        raise FormatError(
            f"{latest}: {name} has the shape {_shape(stored.get(name))} and in the student {_shape(held.get(name))}; "
            "expected a checkpoint of this student"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(stored[name])
    tensors = _load(latest / OPTIMIZER)
    random = tensors.pop("random")
    groups = [
        {**mine, **theirs} for mine, theirs in zip(optimizer.state_dict()["param_groups"], state["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": _nested(tensors, state["numbers"]), "param_groups": groups})
    torch.set_rng_state(random)
    return state


def _found(folder: Path) -> list[Path]:
    names = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(names, key=lambda path: path.name)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's state; what several names share once, under the first."""
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, value in module.state_dict().items():
        key = (value.data_ptr(), value.shape)
        if isinstance(value, Tensor) and (value.numel() == 0 or key not in seen):
            seen.add(key)
            found[name] = value
    return found


def _flat(state: dict[Any, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and numbers, by parameter.name."""
    tensors, numbers = {}, {}
    for parameter, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            elif _is_plain(value):
                numbers[f"{parameter}.{name}"] = value
    return tensors, numbers


def _nested(*parts: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for part in parts:
        for key, value in part.items():
            parameter, _, name = key.partition(".")
            state.setdefault(int(parameter), {})[name] = value
    return state


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("checkpoints need safetensors: pip install 'mnemos[torch]'") from error
    return safetensors.torch


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, _safetensors().save(held))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = _safetensors().load_file(path)
    except Exception as error:
        raise FormatError(f"{path}: cannot be read: {error}") from error
    return loaded


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
