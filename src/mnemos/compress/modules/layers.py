"""The matrices of a module: `nn.Linear`, and the transposed form of it that GPT-2 has in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mnemos.errors import ConfigError, ModelError


def is_matrix(layer: nn.Module) -> bool:
    """Whether a layer multiplies by one matrix and may add a bias: nn.Linear, or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether its weight is stored as (in, out): transformers' Conv1D."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def matrix_of(layer: nn.Module) -> Tensor:
    """A layer's weight as (out, in), a view of its parameter."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if is_transposed(layer) else weight


def set_matrix(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a layer another weight (out, in), of any size, and bias (out,); they become new parameters."""
    changed: Any = layer
    rows, columns = weight.shape
    old = cast(Tensor, layer.weight)
    stored = weight.T if is_transposed(layer) else weight
    changed.weight = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if bias is not None:
        changed.bias = nn.Parameter(bias.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if is_transposed(layer):
        changed.nx, changed.nf = columns, rows
    else:
        changed.in_features, changed.out_features = columns, rows


def set_values(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Writes values into a layer's own parameters: a weight (out, in) of its size, and a bias where it has one."""
    with torch.no_grad():
        matrix_of(layer).copy_(weight)
        if bias is not None:
            cast(Tensor, layer.bias).copy_(bias)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a matrix of their own, by name; one that is an embedding's too is left out.

    ModelError: there is none, or a parameter of the module has values that are not finite.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {name: m for name, m in model.named_modules() if is_matrix(m) and id(m.weight) not in shared}
    if not found:
        raise ModelError(f"{type(model).__name__} has no nn.Linear; expected a module with weights to prune")
    check_finite_parameters(model)
    return found


def check_finite(name: str, values: Tensor) -> None:
    """ModelError if a tensor has NaN or infinite values, with its name, or has no values at all."""
    if isinstance(values, UninitializedParameter):
        raise ModelError(f"{name} has no shape yet (it is lazy); expected a module that has been called once")
    if values.device.type == "meta":
        raise ModelError(f"{name} has no values (its device is meta); expected loaded weights")
    if not bool(torch.isfinite(values.detach()).all()):
        raise ModelError(f"{name} has values that are NaN or infinite; expected finite weights")


def check_finite_parameters(model: nn.Module, prefix: str = "") -> None:
    """ModelError if a parameter has NaN or infinite values, with its name after `prefix`, or has no values at all."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            check_finite(prefix + name, parameter)


def place_of(fn: Callable[[Tensor], Tensor], place: torch.device | str = "cpu") -> torch.device:
    """The device to which `fn`, as `nn.Module._apply` gets it from `to`, `cuda` and others, moves a tensor at `place`.

    ConfigError: PyTorch cannot use that device here.
    """
    try:
        return fn(torch.zeros(1, device=place)).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the device cannot be used here: {reason}; expected 'cpu' or one that PyTorch has"
        ) from error


def stay_on_cpu(fn: Callable[[Tensor], Tensor], what: str, instead: str) -> None:
    """ConfigError if `fn`, see `place_of`, moves anything away from the CPU. instead: what to do for that."""
    place = place_of(fn)
    if place.type != "cpu":
        raise ConfigError(f"device is {str(place)!r}; {what} stay on the CPU: {instead}")


def check_module(model: object, field: str = "model") -> nn.Module:
    """The model if it is an nn.Module, else ConfigError."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{field} is a {type(model).__name__}; expected a torch.nn.Module")
    return model


def stages(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Names of layers by the member of the outermost list of blocks that they are in, in the order given."""
    lists = [name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    found: dict[str, list[str]] = {}
    for name in names:
        outer = next((one for one in lists if name.startswith(f"{one}.")), None)
        stage = "" if outer is None else ".".join(name.split(".")[: outer.count(".") + 2])
        found.setdefault(stage, []).append(name)
    return list(found.values())
