"""How a foreign module's forward is called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.answer import Answer, AnswerReader, Conventions
from mnemos.models.foreign.cache_styles import AttentionStyle, CacheStyle, GivenStyle, KVCacheStyle, mapped
from mnemos.models.foreign.inner_cache import Held, InnerState, InnerStyle
from mnemos.models.foreign.native_steps import NativeOperators
from mnemos.models.foreign.packed_layers import PackedLayers
from mnemos.models.foreign.signature import describe, device_of, read_signature, unwrap
from mnemos.models.foreign.stored_tensors import StoredTensors

# A module is changed while an engine calls it, so it is lent to one engine at a time.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Caller:
    """Calls one module, in evaluation mode and without gradients, and reads what comes back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner = unwrap(module)
        self.signature = read_signature(module)
        self._reader = AnswerReader(module)
        self._first = next(module.parameters(), None)
        self._members = list(module.modules())
        with _LOCKS_LOCK:
            self.lock = _LOCKS.setdefault(self.inner, threading.RLock())
        self.head: nn.Module | None = None
        self.hidden: Tensor | None = None
        self._hidden_like_answers = False
        self._packed = PackedLayers(module)
        self._stored: StoredTensors | None = StoredTensors(module)
        self._inference = False
        self.plain: InnerState | None = None  # what calls without a cache are isolated from, as they change it too

    @property
    def device(self) -> torch.device:
        """Where the module is now; it may have been moved."""
        return device_of(self.module) if self._first is None else self._first.device

    @property
    def native(self) -> NativeOperators | None:
        """The native core's operators for calls of few tokens, where it has any part in the module."""
        return self._packed.native

    def watch(self, head: nn.Module, like_answers: bool = False) -> None:
        """From now on keeps what `head` (the output projection) reads as `hidden`, (batch, time, hidden size).

        like_answers: it has the axes of the module's answers, which may be others.
        """
        self.head, self._hidden_like_answers = head, like_answers

    def shaped(self, values: Tensor, ids: Tensor) -> Tensor:
        """Values in the module's own axes as (batch, time or 1, width)."""
        return self._reader.shaped(values, ids)

    @property
    def conventions(self) -> Conventions:
        """What its names do not say."""
        return self._reader.conventions

    @conventions.setter
    def conventions(self, found: Conventions) -> None:
        self._reader.conventions = found

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
        inner: tuple[InnerState, Held] | None = None,
    ) -> Answer:
        """Runs ids (batch, time). mask (batch, past + time) bool; positions (batch, time); both only where taken.

        A mask that is added to attention's scores, (batch, 1, time, past + time), is handed on as it is.

        inner: a state of the module itself that is lent to it, and replaced by the one after the call.
        """
        names = self.signature
        arguments: dict[str, Any] = {}
        known = self.conventions
        if known.one_sequence and len(ids) > 1:
            raise ModelError(f"{describe(self.module)} takes one sequence; it was given {len(ids)}")
        if known.one_sequence:
            past = mapped(past, lambda tensor: tensor.squeeze(0))
        if names.past and past is None and names.past in names.required and known.initial is not None:
            with ids.device:
                past = known.initial(len(ids))
        if names.past and (past is not None or names.past in names.required):
            arguments[names.past] = past
        if names.use_cache:
            arguments[names.use_cache] = use_cache
        if names.causal and known.causal is not None:
            before = 0 if (not use_cache and inner is None) or positions is None else int(positions[0, 0])
            arguments[names.causal] = known.causal(ids.shape[1], before + ids.shape[1], ids.device)
        if names.mask and mask is None and names.mask in names.required:
            before = 0 if (past is None and inner is None) or positions is None else int(positions[0, 0])
            mask = torch.ones(len(ids), before + ids.shape[1], device=ids.device)
        if names.mask and mask is not None:
            if mask.dim() == 2:
                mask = (mask[0] if known.one_sequence else mask).to(torch.int64)
            arguments[names.mask] = mask
        if names.positions and positions is not None:
            arguments[names.positions] = positions[0] if known.row_positions or known.one_sequence else positions
        if names.offset and positions is not None:
            arguments[names.offset] = int(positions[0, 0])
        drives = inner is not None and inner[0].drive.cache_positions
        if names.cache_positions and positions is not None and (drives or names.cache_positions in names.required):
            arguments[names.cache_positions] = positions[0]
        if names.logits_to_keep and last_only:
            arguments["logits_to_keep"] = 1
        self.hidden = None
        if inner is None and self.plain is not None:
            inner = self.plain, self.plain.fresh(len(ids))
        with self.running(ids, inner):
            given = ids.T if known.time_first else ids[0] if known.one_sequence else ids
            if names.by_keyword:
                output = self.module(**{names.ids: given}, **arguments)
            else:
                output = self.module(given, **arguments)
        if self.hidden is not None and self._hidden_like_answers:
            self.hidden = self.shaped(self.hidden, ids)
        answer = self._reader.read(output, ids)
        if known.one_sequence:
            answer.past = mapped(answer.past, lambda tensor: tensor[None])
        return answer

    @contextmanager
    def running(self, ids: Tensor, inner: tuple[InnerState, Held] | None = None) -> Iterator[None]:
        """Evaluation mode, no gradients, and a ModelError for whatever the module raises over `ids`."""
        with self.lock:
            yield from self._running(ids, inner)

    def _running(self, ids: Tensor, inner: tuple[InnerState, Held] | None) -> Iterator[None]:
        modes = self._evaluate()
        self._packed.install(ids.numel())
        # For the call only: a hook that stays would be copied and saved with the module.
        hook = None if self.head is None else self.head.register_forward_pre_hook(self._keep_hidden)
        if inner is not None:
            inner[0].install(inner[1])
        try:
            with torch.inference_mode() if self._inference else torch.no_grad():
                yield
        except Exception as error:
            raise ModelError(
                f"{describe(self.module)} raised {type(error).__name__}: {error} "
                f"(input ids of shape {tuple(ids.shape)} on {ids.device}, parameters on {self.device})"
            ) from error
        finally:
            if inner is not None:
                inner[1].values = inner[0].release()
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
    if isinstance(style, InnerStyle):
        return drive(caller, style.state, ids, past, positions, mask, last_only)
    before = past.length if isinstance(style, KVCacheStyle) else 0
    answer = caller(ids, past=past, use_cache=True, mask=mask, positions=positions, last_only=last_only)
    if isinstance(style, GivenStyle):
        return answer.logits, past
    if isinstance(style, KVCacheStyle):
        if past.length == before:  # the module leaves the counting to its caller
            past.increment_length(ids.shape[1])
        return answer.logits, past
    return answer.logits, answer.past if answer.past is not None else past


def drive(
    caller: Caller,
    state: InnerState,
    ids: Tensor,
    past: Held | None,
    positions: Tensor,
    mask: Tensor | None = None,
    last_only: bool = False,
) -> tuple[Tensor, Held]:
    """As `advance`, for a module that is lent its state; `past` is used up by the call."""
    held = state.fresh(len(ids)) if past is None else past
    answer = caller(
        ids,
        past=held.given,
        use_cache=True,
        mask=mask,
        positions=positions,
        last_only=last_only,
        inner=(state, held),
    )
    if answer.past is not None and caller.signature.past is not None:
        held.given = answer.past
    return answer.logits, held
