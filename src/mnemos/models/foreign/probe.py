"""What a foreign module can do, found once by trying it on a few tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mnemos.errors import ModelError
from mnemos.models.foreign.answer import Answer
from mnemos.models.foreign.cache_probe import PROBE_LENGTH, CacheAbilities, CacheProbe
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.comparison import difference, tolerance
from mnemos.models.foreign.conventions import find_axes, find_causal_mask, find_conventions
from mnemos.models.foreign.inner_probe import find_plain
from mnemos.models.foreign.position_tables import PositionTables, common_positions
from mnemos.models.foreign.signature import describe


@dataclass(frozen=True)
class Abilities:
    """What a module was found to be able to do.

    vocabulary        the size of a row of logits
    hidden_size       of what the output projection reads; 0: there is none to be seen
    last_only         it answers for the last position only
    batches           rows of one call do not influence each other
    cache             what it can do with its cache; None: it has none, and is run again over all tokens
    table_positions   the most positions that its tables have; None: it has no such tables
    """

    vocabulary: int
    hidden_size: int
    last_only: bool
    batches: bool
    cache: CacheAbilities | None
    table_positions: int | None


class Probe:
    """Tries token ids that every embedding of the module has, whichever of them is the vocabulary's."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        sizes = [m.num_embeddings for m in caller.module.modules() if isinstance(m, nn.Embedding)]
        self.size = min(sizes, default=2)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, self.size, (2, PROBE_LENGTH), generator=generator, device="cpu").to(caller.device)

    def run(self, use_kv_cache: bool, context: int) -> Abilities:
        """Tries the module. context: the positions that it says it has.

        ModelError: it is not a causal language model.
        """
        find_conventions(self.caller, self.ids)
        try:
            return self._run(use_kv_cache, context)
        except ModelError:
            if not find_axes(self.caller, self.ids):
                raise
        return self._run(use_kv_cache, context)

    def _run(self, use_kv_cache: bool, context: int) -> Abilities:
        caller = self.caller
        plain = find_plain(caller, self.ids, context)
        caller.plain = None if plain is None else plain.state
        answer, seen = self._watched(PROBE_LENGTH)
        logits = self._check_shape(answer)
        last_only = logits.shape[1] == 1
        self.tolerance = tolerance(caller.module, logits)
        shorter, seen_shorter = self._watched(PROBE_LENGTH - 1)
        if not last_only and not self._is_causal(logits, shorter.logits):
            if find_causal_mask(caller, self.ids):
                return self._run(use_kv_cache, context)
            self._refuse(logits, shorter.logits)
        batches = self._find_batches(logits)
        if batches is None:
            caller.conventions = replace(caller.conventions, time_first=True)
            return self._run(use_kv_cache, context)
        self._find_head(logits, batches)
        hidden = 0 if caller.head is None else int(self._hidden_size())
        cache = None
        if use_kv_cache:
            cache = CacheProbe(caller, self.ids, self.tolerance).run(batches, last_only, context, plain)
        return Abilities(logits.shape[2], hidden, last_only, batches, cache, common_positions(seen, seen_shorter))

    def _watched(self, length: int) -> tuple[Answer, PositionTables]:
        """A call over the first `length` ids, and what it showed of the module's tables of positions."""
        with PositionTables(self.caller.module, length) as tables:
            return self.caller(self.ids[:1, :length], positions=self._positions(0, length)), tables

    def _positions(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.caller.device)[None, :]

    def _check_shape(self, answer: Answer) -> Tensor:
        logits = answer.logits
        if logits.shape[0] != 1 or logits.shape[1] not in (1, PROBE_LENGTH):
            raise ModelError(
                f"{describe(self.caller.module)} returned logits of shape {tuple(logits.shape)} for ids of shape "
                f"(1, {PROBE_LENGTH}); expected (1, {PROBE_LENGTH}, vocabulary)"
            )
        # A module may rule tokens out by -inf, as long as it leaves some.
        if (~torch.isfinite(logits) & ~torch.isneginf(logits)).any() or torch.isneginf(logits).all(2).any():
            raise ModelError(
                f"{describe(self.caller.module)} returned logits that are not finite for ids {self.ids[0].tolist()}; "
                "expected numbers, or -inf for some tokens of the vocabulary"
            )
        return logits

    def _is_causal(self, logits: Tensor, shorter: Tensor) -> bool:
        """`shorter`: the logits of the ids without the last one, which no earlier logits may depend on."""
        name, last = describe(self.caller.module), PROBE_LENGTH - 1
        if shorter.shape != (1, last, logits.shape[2]):
            raise ModelError(
                f"{name} returned logits of shape {tuple(shorter.shape)} for ids of shape (1, {last}); expected "
                f"(1, {last}, {logits.shape[2]})"
            )
        return difference(shorter, logits[:, :-1]) <= self.tolerance

    def _refuse(self, logits: Tensor, shorter: Tensor) -> NoReturn:
        """ModelError for a module that is not causal, as it is, or from call to call."""
        name, apart = describe(self.caller.module), difference(shorter, logits[:, :-1])
        again = self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH)).logits
        if again.shape == logits.shape and difference(again, logits) > self.tolerance:
            raise ModelError(
                f"{name} returns other logits for the same ids when it is called again, by up to "
                f"{difference(again, logits):.3g}; expected the same in evaluation mode (does dropout ignore "
                "self.training, or is something real from call to call?)"
            )
        raise ModelError(
            f"{name} is not causal: without token {PROBE_LENGTH - 1}, the logits of earlier tokens differ by up to "
            f"{apart:.3g}; expected no difference (is a causal mask missing?)"
        )

    def _find_batches(self, logits: Tensor) -> bool | None:
        """Whether rows of a call are independent; `logits` are those of the first alone. None: rows are time."""
        name, positions = describe(self.caller.module), self._positions(0, PROBE_LENGTH)
        try:
            both = self.caller(self.ids, positions=positions.expand(self.ids.shape)).logits
        except ModelError:
            return False  # it takes one sequence at a time
        alone = torch.cat((logits, self.caller(self.ids[1:], positions=positions).logits))
        if both.shape != alone.shape:
            return False
        apart = difference(both, alone)
        if apart <= self.tolerance:
            return True
        other = self.ids[:1].clone()
        other[0, 0] = (other[0, 0] + 1) % self.size
        changed = self.caller(other, positions=positions).logits
        if not self.caller.conventions.time_first and difference(changed[:, -1], logits[:, -1]) <= self.tolerance:
            return None  # a row's logits depend on the row before it, and not on earlier tokens of its own
        warnings.warn(
            f"{name}: sequences of one call influence each other's logits, by up to {apart:.3g} (allowed "
            f"{self.tolerance:.3g}); each is run by itself",
            stacklevel=4,
        )
        return False

    def _find_head(self, logits: Tensor, batches: bool) -> None:
        """The linear layer whose output the logits are; contrastive search needs what it reads."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append((module, output))

        linears = [m for m in self.caller.module.modules() if _is_linear(m) and m.out_features == logits.shape[2]]
        handles = [linear.register_forward_hook(keep) for linear in linears]
        ids = self.ids if batches else self.ids[:1]
        try:
            answer = self.caller(ids, positions=self._positions(0, PROBE_LENGTH).expand(ids.shape))
        finally:
            for handle in handles:
                handle.remove()
        for module, output in reversed(seen):
            for like_answers in (False, True):
                shaped = self.caller.shaped(output, ids) if like_answers else output
                if shaped.shape == answer.logits.shape and torch.equal(shaped, answer.logits.to(output.dtype)):
                    self.caller.watch(module, like_answers)
                    return

    def _hidden_size(self) -> int:
        self.caller(self.ids[:1], positions=self._positions(0, PROBE_LENGTH))
        assert self.caller.hidden is not None
        return self.caller.hidden.shape[-1]


def _is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear, or one of quantized weights that stands where that stood."""
    return isinstance(module, nn.Linear) or hasattr(module, "rounds_inputs")
