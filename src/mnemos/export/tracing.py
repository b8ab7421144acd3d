"""What stands in the way of a trace and has a plain form: functions with a gradient of their own, compiled parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.function import Function


@contextmanager
def without_gradients() -> Iterator[None]:
    """Inside, `torch.autograd.Function` computes by its forward alone: a trace that holds one cannot be saved.

    Checkpointing with use_reentrant=True is such a function.
    """
    own: Any = Function.__dict__["apply"]
    Function.apply = classmethod(_apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Function.apply = own  # type: ignore[method-assign]


def _apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
    if kind.setup_context is not Function.setup_context:  # then forward itself has no context
        return kind.forward(*args, **kwargs)
    return kind.forward(_Context(len(args)), *args, **kwargs)


class _Context:
    """What forward keeps for a gradient, for which nobody will ask."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: Any) -> None: ...

    def save_for_forward(self, *tensors: Any) -> None: ...

    def mark_dirty(self, *tensors: Any) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def uncompiled(module: Any) -> Any:
    """What was given to torch.compile, if the module is what that returned."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def uncompiled_parts(module: nn.Module) -> Iterator[None]:
    """Inside, parts that torch.compile or `Module.compile` wrapped are what they were before; no trace takes them."""
    wrapped = [
        (parent, name, part)
        for parent in module.modules()
        for name, part in parent._modules.items()
        if uncompiled(part) is not part
    ]
    calls = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for parent, name, part in wrapped:
        parent._modules[name] = uncompiled(part)
    for part in calls:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in calls.items():
            part._compiled_call_impl = call
        for parent, name, part in wrapped:
            parent._modules[name] = part
