"""How a foreign module's forward is called, and how its answer is read."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.cache_styles import AttentionStyle, CacheStyle, KVCacheStyle
from mnemos.models.foreign.native_steps import NativeOperators
from mnemos.models.foreign.packed_layers import PackedLayers
from mnemos.models.foreign.stored_tensors import StoredTensors

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

    positions: (batch, time); offset: one number, the position of the first new token of all sequences; required: the
    names that have no default.
    """

    ids: str
    mask: str | None
    positions: str | None
    offset: str | None
    past: str | None
    use_cache: bool
    logits_to_keep: bool
    required: frozenset[str]


def describe(module: nn.Module) -> str:
    """The module's class and its forward's signature, for messages."""
    inner = unwrap(module)
    name = type(module).__name__ if inner is module else f"{type(module).__name__}({type(inner).__name__})"
    return f"{name}.forward{_signature(inner)}"


def unwrap(module: nn.Module) -> nn.Module:
    """The module that says what it takes, inside wrappers that hand on (*args, **kwargs) such as DataParallel."""
    while not any(p.kind in _NAMED for p in _signature(module).parameters.values()):
        children = list(module.children())
        if len(children) != 1:
            break
        module = children[0]
    return module


_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _signature(module: nn.Module) -> inspect.Signature:
    schema: Any = getattr(module.forward, "schema", None)
    if schema is None:
        return inspect.signature(module.forward)
    given = schema.arguments[1:]  # TorchScript keeps no signature, but says as much itself
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    defaults = [one.default_value if one.has_default_value() else empty for one in given]
    return inspect.Signature(
        [inspect.Parameter(one.name, kind, default=value) for one, value in zip(given, defaults, strict=True)]
    )


def read_signature(module: nn.Module) -> Signature:
    """What module.forward takes, by the names that people write. ModelError: token ids alone are not enough."""
    named = {name: p for name, p in _signature(unwrap(module)).parameters.items() if p.kind in _NAMED}
    if "input_ids" in named:
        ids = "input_ids"
    elif named:
        ids = next(iter(named))
    else:
        raise ModelError(
            f"{describe(module)} names no argument; expected forward(input_ids, ...) with int64 (batch, time)"
        )

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in named), None)

    known = {ids, *MASK_NAMES, *POSITION_NAMES, *OFFSET_NAMES, *PAST_NAMES, "use_cache", "logits_to_keep"}
    required = frozenset(name for name, p in named.items() if p.default is inspect.Parameter.empty)
    unknown = [name for name in named if name in required - known]
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
        required=required,
    )


# A module is changed while an engine calls it, so it is lent to one engine at a time.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@dataclass
class Answer:
    """logits (batch, time or 1, vocabulary); past: the cache as the module returned it, or None."""

    logits: Tensor
    past: Any


class Caller:
    """Calls one module, in evaluation mode and without gradients, and reads what comes back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner = unwrap(module)
        self.signature = read_signature(module)
        self._first = next(module.parameters(), None)
        self._members = list(module.modules())
        with _LOCKS_LOCK:
            self.lock = _LOCKS.setdefault(self.inner, threading.RLock())
        self.head: nn.Module | None = None
        self.hidden: Tensor | None = None
        self._packed = PackedLayers(module)
        self._stored: StoredTensors | None = StoredTensors(module)
        self._inference = False

    @property
    def device(self) -> torch.device:
        """Where the module is now; it may have been moved."""
        return torch.device("cpu") if self._first is None else self._first.device

    @property
    def native(self) -> NativeOperators | None:
        """The native core's operators for calls of few tokens, where it has any part in the module."""
        return self._packed.native

    def watch(self, head: nn.Module) -> None:
        """From now on keeps what `head` (the output projection) reads as `hidden`, (batch, time, hidden size)."""
        self.head = head

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
        if names.past and (past is not None or names.past in names.required):
            arguments[names.past] = past
        if names.use_cache:
            arguments["use_cache"] = use_cache
        if names.mask and mask is None and names.mask in names.required:
            before = 0 if past is None or positions is None else int(positions[0, 0])
            mask = torch.ones(len(ids), before + ids.shape[1], device=ids.device)
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
        with self.lock:
            yield from self._running(ids)

    def _running(self, ids: Tensor) -> Iterator[None]:
        modes = self._evaluate()
        self._packed.install(ids.numel())
        # For the call only: a hook that stays would be copied and saved with the module.
        hook = None if self.head is None else self.head.register_forward_pre_hook(self._keep_hidden)
        try:
            with torch.inference_mode() if self._inference else torch.no_grad():
                yield
        except Exception as error:
            raise ModelError(
                f"{describe(self.module)} raised {type(error).__name__}: {error} "
                f"(input ids of shape {tuple(ids.shape)} on {ids.device}, parameters on {self.device})"
            ) from error
        finally:
            if hook is not None:
                hook.remove()
            self._packed.remove()
            if self._inference and self._stored is not None:
                self._stored.replace_new()
            for module, training in modes:  # parents before their children
                if module.training != training:
                    module.train(training)

    def _evaluate(self) -> list[tuple[nn.Module, bool]]:
        """Puts all of the module into evaluation mode; returns which part was in which mode, nothing if all were."""
        if not self.module.training and not any(member.training for member in self._members):
            return []
        modes = [(member, member.training) for member in self.module.modules()]
        self.module.eval()
        return modes

    def settle(self) -> None:
        """After the first calls: others run in PyTorch's inference mode, unless the module stored tensors of these."""
        self._inference = self._stored is not None and not self._stored.any_new()
        if not self._inference:
            self._stored = None

    def check_weights(self) -> None:
        """Before a new text: notices weights that were changed where PyTorch does not count it, by `.data`."""
        self._packed.check()


def advance(
    caller: Caller,
    style: CacheStyle,
    ids: Tensor,
    past: Any,
    positions: Tensor,
    real: Tensor | None,
    new_real: Tensor | None = None,
    last_only: bool = False,
) -> tuple[Tensor, Any]:
    """Runs `ids` (batch, new time) after `past` and returns (logits, the new past).

    real (batch, past time) bool, new_real (batch, new time) bool: which cached and new positions are real; None: all.
    """
    mask = None
    if real is not None or new_real is not None:
        before = int(positions[0, 0])  # without gaps, all sequences have as many
        old = torch.ones(len(ids), before, dtype=torch.bool, device=ids.device) if real is None else real
        new = new_real if new_real is not None else torch.ones_like(ids, dtype=torch.bool)
        mask = torch.cat((old, new), dim=1)
    if isinstance(style, AttentionStyle):
        with caller.lock:
            style.install(past, mask)
            try:
                answer = caller(ids, use_cache=True, mask=mask, positions=positions)
            finally:
                taken = style.release()
        return answer.logits, taken
    before = past.length if isinstance(style, KVCacheStyle) else 0
    answer = caller(ids, past=past, use_cache=True, mask=mask, positions=positions, last_only=last_only)
    if isinstance(style, KVCacheStyle):
        if past.length == before:  # the module leaves the counting to its caller
            past.increment_length(ids.shape[1])
        return answer.logits, past
    return answer.logits, answer.past if answer.past is not None else past


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
        past = next((item for item in output if item is not logits and _may_be_past(item)), None)
    else:
        logits = None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(
            f"{describe(module)} returned {seen}; expected floating-point logits of shape (batch, time, vocabulary): "
            "a tensor, the first such tensor of a tuple, a mapping's 'logits', or an object's .logits"
        )
    return Answer(logits, past)


def _may_be_past(item: Any) -> bool:
    """Tensors in a container or object, or one that stacks all layers: at least (layer, batch, time, width)."""
    return item.dim() >= 4 if isinstance(item, Tensor) else holds_tensors(item)


def holds_tensors(item: Any) -> bool:
    if isinstance(item, Tensor):
        return True
    if isinstance(item, Mapping):
        return any(holds_tensors(value) for value in item.values())
    if isinstance(item, (tuple, list)):
        return any(holds_tensors(value) for value in item)
    return hasattr(item, "get_seq_length") or hasattr(item, "leaves")
