"""Removes whole layers, those that change their input least (Men et al., "ShortGPT", 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.compress.modules.batches import call, evaluating, split_batch
from mnemos.compress.modules.configs import resize_layers
from mnemos.errors import ModelError

Stack = nn.ModuleList | nn.Sequential


def find_stack(model: nn.Module) -> str:
    """The name of the list of a module's layers: of those with at least two members of one class, the largest.

    ModelError if there is none.
    """
    stacks: dict[str, int] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(module) > 1
        and len({type(member) for member in module}) == 1
    }
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of layers of one class; expected an nn.ModuleList of them"
        )
    return max(stacks, key=lambda name: stacks[name])


def least_needed(model: nn.Module, stack: str, batches: Sequence[Any], count: int) -> list[int]:
    """The numbers of the `count` layers whose removal, one after the other, changes least what flows on."""
    layers = list(cast(Stack, model.get_submodule(stack)))
    gone: list[int] = []
    while len(gone) < count:
        influence = _influences(model, layers, gone, batches)
        if not influence:  # lists of a layer's parts, which are never called themselves
            return spread_out(len(layers), count)
        gone.append(min(influence, key=lambda i: influence[i]))
    return sorted(gone)


def _influences(model: nn.Module, layers: list[nn.Module], gone: list[int], batches: Sequence[Any]) -> dict[int, float]:
    """One minus the cosine of each layer's input and output, on average; those that are gone pass their input on."""
    totals: dict[int, float] = {}

    def note(number: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], answer: Any) -> Any:
            before = given[0] if given else next(v for v in named.values() if isinstance(v, Tensor))
            after = answer if isinstance(answer, Tensor) else answer[0]
            if number in gone:
                return before if isinstance(answer, Tensor) else (before, *answer[1:])
            change = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean()
            totals[number] = totals.get(number, 0.0) + float(change)
            return None

        return hook

    hooks = [layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with evaluating(model):
            for batch in batches:
                call(model, split_batch(batch)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def spread_out(before: int, count: int) -> list[int]:
    """The numbers of `count` of `before` layers that go where nothing is known: spread evenly, the ends stay last."""
    kept = torch.linspace(0, before - 1, before - count).round().long().tolist()
    return [i for i in range(before) if i not in kept]


def remove_layers(model: nn.Module, stack: str, gone: Sequence[int]) -> None:
    """Takes these layers out of the module, and numbers the others anew."""
    layers = cast(Stack, model.get_submodule(stack))
    before = len(layers)
    kept = [i for i in range(before) if i not in set(gone)]
    for i in sorted(gone, reverse=True):
        del layers[i]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if type(vars(module).get("layer_idx")) is int:
                cast(Any, module).layer_idx = number
    owner: Any = model.get_submodule(stack.rpartition(".")[0])
    for name, value in list(vars(owner).items()):
        if type(value) is int and value == before and "layer" in name:
            setattr(owner, name, len(kept))
    resize_layers(model, kept, before)
