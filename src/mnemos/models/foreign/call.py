"""How a foreign module's forward is called, and how its answer is read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.few import FewRows
from mnemos.models.foreign.packing import PackedLayers

MASK_NAMES = ("attention_mask",)
POSITION_NAMES = ("position_ids", "positions")
OFFSET_NAMES = ("start_pos", "past_length")
PAST_NAMES = (
    "past_key_values", "past_kv", "past_kvs", "past_key_value", "past", "layer_past", "kv_cache", "kv_caches", "cache",
    "caches",
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """The names under which a forward takes what the engine has to say; None where it takes no such thing.

    positions: (batch, time); offset: one number, the position of the first new token of all sequences.
    """

    ids: str
    mask: str | None
    positions: str | None
    offset: str | None
    past: str | None
    use_cache: bool
    logits_to_keep: bool


def describe(module: nn.Module) -> str:
    """The module's class and its forward's signature, for messages."""
    return f"{type(module).__name__}.forward{inspect.signature(module.forward)}"


def read_signature(module: nn.Module) -> Signature:
    """What module.forward takes, by the names that people write. ModelError: token ids alone are not enough."""
    parameters = inspect.signature(module.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name: p for name, p in parameters.items() if p.kind in kinds}
    if "input_ids" in named:
        ids = "input_ids"
    elif named:
        ids = next(iter(named))
    else:
        raise ModelError(
            f"{describe(module)} takes no argument; expected forward(input_ids, ...) with int64 (batch, time)"
        )

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in named), None)

    known = {ids, *MASK_NAMES, *POSITION_NAMES, *OFFSET_NAMES, *PAST_NAMES, "use_cache", "logits_to_keep"}
    unknown = [n for n, p in named.items() if n not in known and p.default is inspect.Parameter.empty]
    if unknown:
        raise ModelError(
            f"{describe(module)} requires {', '.join(unknown)}, which the engine does not have; "
            f"expected forward(input_ids) with, at most, {', '.join(sorted(known - {ids}))} beside it"
        )
    return Signature(
        ids=ids,
        mask=first(MASK_NAMES),
        positions=first(POSITION_NAMES),
        offset=first(OFFSET_NAMES),
        past=first(PAST_NAMES),
        use_cache="use_cache" in named,
        logits_to_keep="logits_to_keep" in named,
    )


@dataclass
class Answer:
    """logits (batch, time or 1, vocabulary); past: the cache as the module returned it, or None."""

    logits: Tensor
    past: Any


class Caller:
    """Calls one module, in evaluation mode and without gradients, and reads what comes back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.signature = read_signature(module)
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.head: nn.Module | None = None
        self.hidden: Tensor | None = None
        self._packed = PackedLayers(module)

    @property
    def few(self) -> FewRows | None:
        """The native core's operators for calls of few tokens, where it has any part in the module."""
        return self._packed.few

    def watch(self, head: nn.Module) -> None:
        """Keeps what `head` (the output projection) reads as `hidden`, (batch, time, hidden size)."""
        self.head = head
        head.register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.hidden = inputs[0]

    def __call__(
        self,
        ids: Tensor,
        *,
        past: Any = None,
        use_cache: bool = False,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
    ) -> Answer:
        """Runs ids (batch, time). mask (batch, past + time) bool; positions (batch, time); both only where taken."""
        names = self.signature
        arguments: dict[str, Any] = {}
        if names.past and past is not None:
            arguments[names.past] = past
        if names.use_cache:
            arguments["use_cache"] = use_cache
        if names.mask and mask is not None:
            arguments[names.mask] = mask.to(torch.int64)
        if names.positions and positions is not None:
            arguments[names.positions] = positions
        if names.offset and positions is not None:
            arguments[names.offset] = int(positions[0, 0])
        if names.logits_to_keep and last_only:
            arguments["logits_to_keep"] = 1
        self.hidden = None
        with self.running(ids):
            if names.ids == "input_ids":
                output = self.module(input_ids=ids, **arguments)
            else:
                output = self.module(ids, **arguments)
        return read_output(output, self.module)

    @contextmanager
    def running(self, ids: Tensor) -> Iterator[None]:
        """Evaluation mode, no gradients, and a ModelError for whatever the module raises over `ids`."""
        training = self.module.training
        if training:
            self.module.eval()
        self._packed.install(ids.numel())
        try:
            with torch.inference_mode():
                yield
        except Exception as error:
            raise ModelError(
                f"{describe(self.module)} raised {type(error).__name__}: {error} "
                f"(input ids of shape {tuple(ids.shape)} on {ids.device}, parameters on {self.device})"
            ) from error
        finally:
            self._packed.remove()
            if training:
                self.module.train()


def read_output(output: Any, module: nn.Module) -> Answer:
    """Logits and cache from a tensor, a tuple, a mapping or an object with `.logits`."""
    past: Any = None
    if isinstance(output, Tensor):
        logits: Any = output
    elif hasattr(output, "logits"):
        logits = output.logits
        past = next((getattr(output, n) for n in PAST_NAMES if getattr(output, n, None) is not None), None)
    elif isinstance(output, Mapping):
        logits = output.get("logits")
        past = next((output[n] for n in PAST_NAMES if output.get(n) is not None), None)
    elif isinstance(output, (tuple, list)):
        logits = next((item for item in output if isinstance(item, Tensor) and item.dim() == 3), None)
        past = next((item for item in output if not isinstance(item, Tensor) and holds_tensors(item)), None)
    else:
        logits = None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(
            f"{describe(module)} returned {seen}; expected floating-point logits of shape (batch, time, vocabulary): "
            "a tensor, the first such tensor of a tuple, a mapping's 'logits', or an object's .logits"
        )
    return Answer(logits, past)


def holds_tensors(item: Any) -> bool:
    if isinstance(item, Tensor):
        return True
    if isinstance(item, Mapping):
        return any(holds_tensors(value) for value in item.values())
    if isinstance(item, (tuple, list)):
        return any(holds_tensors(value) for value in item)
    return hasattr(item, "get_seq_length") or hasattr(item, "leaves")
