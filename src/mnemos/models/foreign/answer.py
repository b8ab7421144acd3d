"""How the answer of a foreign module's forward is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.signature import PAST_NAMES, describe

CausalMask = Callable[[int, int, torch.device], Tensor]


@dataclass(frozen=True)
class Conventions:
    """What a module expects and returns, and the names of its arguments do not say.

    time_first         its tensors are (time, batch)
    vocabulary_second  its logits are (batch, vocabulary, time), as cross_entropy takes them
    one_sequence       it takes the ids (time,) of one sequence, and its tensors have no axis for the batch
    row_positions      its positions are (time,), one row for all sequences
    initial            makes the cache or state that a first call of so many sequences has to be given
    causal             makes the mask of (new, all positions) that it has to be given; None: it makes its own
    """

    time_first: bool = False
    vocabulary_second: bool = False
    one_sequence: bool = False
    row_positions: bool = False
    initial: Callable[[int], Any] | None = None
    causal: CausalMask | None = None


@dataclass
class Answer:
    """logits (batch, time or 1, vocabulary); past: the cache as the module returned it, or None."""

    logits: Tensor
    past: Any


class AnswerReader:
    """Finds logits and cache in a tensor, a tuple, a mapping or an object with `.logits`.

    conventions: of the module's tensors. Logits of all tokens in one axis, (batch * time, vocabulary), and of the last
    token of each row alone, (batch, vocabulary), are read too.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.conventions = Conventions()
        self._vocabularies = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}

    def read(self, output: Any, ids: Tensor) -> Answer:
        """What the module answered to ids (batch, time). ModelError: there are no logits in it."""
        past: Any = None
        if isinstance(output, Tensor):
            logits: Any = output
        elif hasattr(output, "logits"):
            logits = output.logits
            past = next((getattr(output, n) for n in PAST_NAMES if getattr(output, n, None) is not None), None)
        elif isinstance(output, (tuple, list)):
            logits = self._logits(output, ids)
            past = _past([item for item in output if item is not logits])
        else:
            named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
            logits = named["logits"] if "logits" in named else self._logits(list(named.values()), ids)
            past = next((named[n] for n in PAST_NAMES if named.get(n) is not None), None)
        if isinstance(logits, Tensor):
            logits = self.shaped(logits, ids)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
            seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise ModelError(
                f"{describe(self._module)} returned {seen}; expected floating-point logits of shape (batch, time, "
                "vocabulary): a tensor, such a tensor of a tuple, a mapping's 'logits', or an object's .logits"
            )
        return Answer(logits, past)

    def shaped(self, values: Tensor, ids: Tensor) -> Tensor:
        """Values for each token of ids (batch, time), or each row, with the axes (batch, time or 1, width)."""
        (rows, time), known = ids.shape, self.conventions
        if known.vocabulary_second and values.dim() == 3 - known.one_sequence:
            values = values.transpose(-1, -2)
        if values.dim() == 1 and known.one_sequence:
            return values[None, None]
        if values.dim() == 2 and len(values) == rows * time:
            values = values.reshape(time, rows, -1) if known.time_first else values.reshape(rows, time, -1)
        elif values.dim() == 2 and len(values) == rows:
            return values[:, None]
        return values.transpose(0, 1) if known.time_first and values.dim() == 3 else values

    def _logits(self, items: Any, ids: Tensor) -> Tensor | None:
        """The logits among a tuple's tensors (batch, time or 1, width).

        A tuple may also hold hidden states. The logits are the tensor as wide as an embedding has entries; where that
        does not tell them apart, the first.
        """
        found = [item for item in items if isinstance(item, Tensor) and item.is_floating_point()]
        tensors = [item for axes in (3, 2, 1) for item in found if item.dim() == axes]
        fitting = [one for one in tensors if _is_of(self.shaped(one, ids), ids)]
        known = [one for one in fitting if self.shaped(one, ids).shape[-1] in self._vocabularies]
        # Logits in other axes than those known so far, beside hidden states that fit.
        other = [one for one in tensors if one.dim() == 3 and one.shape[1] in self._vocabularies]
        return next(iter(known or (other if other and fitting else fitting) or tensors), None)


def _is_of(values: Tensor, ids: Tensor) -> bool:
    """Whether values (batch, time or 1, width) belong to ids (batch, time)."""
    return values.dim() == 3 and len(values) == len(ids) and values.shape[1] in (1, ids.shape[1])


def _past(items: list[Any]) -> Any:
    """A container or object of tensors, or a tensor of all layers; else a single tensor, such as a GRU's state."""
    for item in items:
        if item.dim() >= 4 if isinstance(item, Tensor) else _holds_tensors(item):
            return item
    return next((item for item in items if isinstance(item, Tensor) and item.dim() >= 2), None)


def _holds_tensors(item: Any) -> bool:
    if isinstance(item, Tensor):
        return True
    if isinstance(item, Mapping):
        return any(_holds_tensors(value) for value in item.values())
    if isinstance(item, (tuple, list)):
        return any(_holds_tensors(value) for value in item)
    return hasattr(item, "get_seq_length") or hasattr(item, "leaves")
