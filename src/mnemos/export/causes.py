"""What in a module keeps it from being exported, for errors that say so."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from mnemos.errors import ModelError
from mnemos.export.example import answer_of
from mnemos.export.messages import place_in

Sizes = dict[str, tuple[int, ...]]


def refuse_random(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """ModelError if the module, in evaluation mode, answers the same input differently when it is called again."""
    first, second = ([tensor for _, tensor in answer_of(module, tensors)] for _ in range(2))
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
        raise ModelError(
            f"{type(module).__name__} answers the same input differently when it is called again, so that no file "
            "can be compared with it; it draws random numbers or keeps a state: make forward depend on its inputs"
        )


def refuse_scripts(module: nn.Module, what: str) -> None:
    """ModelError if a part of the module is TorchScript, which torch.export does not look into."""
    scripts = [name for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripts:
        raise ModelError(
            f"{type(module).__name__} cannot be exported to {what}: its part {scripts[0] or 'as a whole'} is a "
            "torch.jit.ScriptModule; put the module there that it was made of, or use TorchScriptExporter"
        )


def table_sizes(module: nn.Module) -> Sizes:
    """The shapes of the tensors that the module's parts keep, other than parameters, by name."""
    return {
        f"{name}.{key}" if name else key: tuple(value.shape)
        for name, part in module.named_modules()
        for key, value in {**part.__dict__, **part._buffers}.items()
        if isinstance(value, Tensor)
    }


def grown_since(module: nn.Module, before: Sizes) -> str:
    """The end of an error about a table that forward has made anew since, such as a rotary embedding's; else empty."""
    for name, size in table_sizes(module).items():
        if name in before and size != before[name]:
            return (
                f"; forward makes {name} anew, {size} in place of {before[name]}, and a file has it as it was: call "
                "the module on the longest text, then export it"
            )
    return ""


def obstacle(program: torch.export.ExportedProgram) -> str:
    """What in a program most runtimes have no form of, and where forward does it; empty if there is no such thing."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        found = ""
        if isinstance(value, Tensor) and value.is_complex():
            found = "complex numbers, {}; compute with their two parts, as rotary embeddings do with cos and sin"
        elif isinstance(value, Tensor) and free_unbacked_symbols(value):
            found = "a size that depends on the data, {}; compute all rows, and mask or weigh those that do not count"
        if found:
            return found.format(place_in(node.meta.get("stack_trace") or "") or f"in {node.name}")
    return ""
