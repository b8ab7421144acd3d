"""How far a module's positions reach, from what it reads of its tables of positions and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PositionTables(TorchFunctionMode):
    """Watches a call over `length` positions and notes every table of the module of which just those are read.

    Such a table is a parameter or buffer that is sliced to `length` along an axis (sines, learned positions, a causal
    mask) or an embedding that is looked up at consecutive positions, also a quantized one, which has `num_embeddings`
    and, where the module reads its weight too, `expanded`. `lengths` holds how many positions it has.
    Code that PyTorch compiles is not seen into.
    """

    def __init__(self, module: nn.Module, length: int) -> None:
        super().__init__()
        self.length = length
        self.lengths: set[tuple[int, int]] = set()  # (which tensor, positions)
        self._tables = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._lookups = [
            member
            for member in module.modules()
            if hasattr(member, "num_embeddings") and not isinstance(member, nn.Embedding)
        ]
        self._tables |= {id(getattr(member, "expanded", None)) for member in self._lookups} - {id(None)}
        self._hooks: list[Any] = []

    def __enter__(self) -> PositionTables:
        self._hooks = [member.register_forward_hook(self._note_call) for member in self._lookups]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _note_call(self, member: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._note_lookup(id(member), int(member.num_embeddings), inputs[0])  # type: ignore[arg-type]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            return result
        if func is torch.Tensor.__getitem__ and id(args[0]) in self._tables:
            self._note_item(args[0], args[1], result)
        elif func is F.embedding and len(args) > 1 and id(args[1]) in self._tables:
            self._note_lookup(id(args[1]), len(args[1]), args[0])
        return result

    def _note_item(self, table: Tensor, index: Any, result: Any) -> None:
        items = index if isinstance(index, tuple) else (index,)
        if len(items) == 1 and isinstance(items[0], Tensor):
            self._note_lookup(id(table), len(table), items[0])
            return
        if not all(item is Ellipsis or isinstance(item, slice) for item in items):
            return
        for whole, part in zip(table.shape, result.shape, strict=True):
            if part == self.length < whole:
                self.lengths.add((id(table), whole))

    def _note_lookup(self, table: int, rows: int, index: Tensor) -> None:
        if index.dim() and index.shape[-1] == index.numel() == self.length and not index.is_floating_point():
            first = int(index.flatten()[0])
            if index.flatten().tolist() == list(range(first, first + self.length)):
                self.lengths.add((table, rows - first))


def common_positions(longer: PositionTables, shorter: PositionTables) -> int | None:
    """The positions that a sequence may have, by tables of which both calls, of different lengths, read their part."""
    both = longer.lengths & shorter.lengths
    return min((positions for _, positions in both), default=None)
