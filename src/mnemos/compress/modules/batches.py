"""Batches as training loops give them, and what a module answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ConfigError, shown
from mnemos.models.foreign.answer import AnswerReader
from mnemos.models.foreign.plain_call import plain_call
from mnemos.models.foreign.signature import device_of

IGNORED = -100  # a label that counts for nothing, as in PyTorch and transformers


def listed(batches: Any, field: str = "batches") -> list[Any]:
    """The batches as a list that can be gone through repeatedly; one tensor or mapping is one batch.

    ConfigError if there are none.
    """
    if isinstance(batches, (Tensor, Mapping)):
        return [batches]
    if not isinstance(batches, Iterable):
        raise ConfigError(f"{field} is {shown(batches)}; expected tensors of token ids (batch, time), or an iterable")
    found = list(batches)
    if not found:
        raise ConfigError(f"{field} is empty; expected at least one batch of token ids (batch, time)")
    return found


def split_batch(batch: Any) -> tuple[dict[str, Any] | Tensor, Tensor | None]:
    """(what forward takes, labels or None) of a tensor, a tuple (inputs, labels), or a mapping with or without labels.

    ConfigError for anything else.
    """
    labels = None
    if isinstance(batch, (tuple, list)) and 0 < len(batch) <= 2:
        labels = batch[1] if len(batch) == 2 else None
        batch = batch[0]
    if isinstance(batch, Mapping):
        fields = {str(name): value for name, value in batch.items() if name != "labels"}
        return fields, batch.get("labels", labels)
    if not isinstance(batch, Tensor):
        raise ConfigError(
            f"a batch is a {type(batch).__name__}; expected token ids (batch, time), (ids, labels), or a mapping of "
            "what forward takes"
        )
    return batch, labels


def ids_of(inputs: Any) -> Tensor:
    """The token ids among a forward's inputs."""
    if isinstance(inputs, Tensor):
        return inputs
    ids = inputs.get("input_ids")
    if ids is None:
        ids = next((v for v in inputs.values() if isinstance(v, Tensor) and not v.is_floating_point()), None)
    if not isinstance(ids, Tensor):
        raise ConfigError(f"a batch has the fields {', '.join(inputs)}; expected input_ids among them")
    return ids


def call(model: nn.Module, inputs: Any) -> Any:
    """The module's own answer to a batch's inputs, which are moved to its device; without a cache where it has one.

    ConfigError: the inputs are neither a tensor nor a mapping.
    """
    if not isinstance(inputs, (Tensor, Mapping)):
        raise ConfigError(f"inputs are {shown(inputs)}; expected a tensor, or a mapping of what forward takes")
    device = device_of(model)
    if isinstance(inputs, Tensor):
        return plain_call(model, inputs.to(device))
    return plain_call(
        model, {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    )


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """The module's logits (batch, time, vocabulary) for a batch's inputs. ModelError if it returns none."""
    answer = call(model, inputs)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():  # no tokens: rows (batch, values) and their classes
        found: Any = answer[0] if isinstance(answer, (tuple, list)) else getattr(answer, "logits", answer)
        logits: Tensor = found[:, None] if found.dim() == 2 else found
        return logits
    return AnswerReader(model).read(answer, ids_of(inputs)).logits


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Evaluation mode without gradients; afterwards every part is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with ExitStack() as stack:
        stack.callback(lambda: [module.train(mode) for module, mode in modes])
        stack.enter_context(torch.no_grad())
        yield
