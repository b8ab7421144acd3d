"""`ForeignModel`: a PyTorch module as a `Model`, its own cache kept sequence by sequence.

The engine's pages are as long as the context here, so that a page is one sequence's slot. A slot remembers which row of
which cache tensors is its own; as long as the same sequences run together their cache stays in the module's own form,
and only when the company changes are rows picked out and put side by side again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnemos.contract import Batch, KVLayout, ModelSpec, Output
from mnemos.errors import ConfigError, ModelError, UnsupportedError
from mnemos.models.foreign.cache_styles import Source, gather
from mnemos.models.foreign.call import Caller, describe
from mnemos.models.foreign.growing_cache import Lane, make_room
from mnemos.models.foreign.probe import Abilities, Probe, advance
from mnemos.models.foreign.settings import find_context, special_tokens


@dataclass
class Slot:
    """One sequence: its tokens so far and, with a cache, where its keys and values lie."""

    tokens: list[int] = field(default_factory=list)
    group: Group | None = None
    source: Source | None = None
    row: int = 0
    condition: Any = None


@dataclass
class Group:
    """Sequences that ran together last, with the cache in the module's own form."""

    past: Any
    slots: list[Slot]
    kept: Tensor | None
    lanes: list[Lane] = field(default_factory=list)  # where the cache's tensors lie, once they have room to grow

    def is_exactly(self, jobs: list[Job]) -> bool:
        """Whether these sequences, in this order, are all that the group has, and none has gone another way."""
        same = [id(slot) for slot in self.slots] == [id(job.slot) for job in jobs]
        return same and all(slot.group is self for slot in self.slots)


class SlotCache:
    """The `Cache` of a foreign model: slots instead of pages."""

    def __init__(self, layout: KVLayout, pages: int, model: ForeignModel) -> None:
        self.layout = layout
        self.pages = pages
        self.slots = [Slot() for _ in range(pages)]
        self._model = model

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Forks sequences; no tensor is copied, as modules replace their cache tensors by longer ones."""
        for source, target in zip(sources, targets, strict=True):
            slot = self.slots[source]
            self._model.freeze(slot)
            self.slots[target] = Slot(list(slot.tokens), None, slot.source, slot.row, slot.condition)

    def read(self, page: int) -> npt.NDArray[np.uint8]:
        raise UnsupportedError("the cache of a PyTorch module cannot be saved; expected a built-in architecture")

    def write(self, page: int, content: npt.NDArray[np.uint8]) -> None:
        raise UnsupportedError("the cache of a PyTorch module cannot be restored; expected a built-in architecture")


@dataclass
class Job:
    """The new tokens of one sequence in this step; `first_row` is where they stand in the batch."""

    slot: Slot
    start: int
    new: list[int]
    first_row: int


class ForeignModel:
    def __init__(self, module: nn.Module, abilities: Abilities, caller: Caller, spec: ModelSpec) -> None:
        self.module = module
        self.spec = spec
        self.abilities = abilities
        self._caller = caller
        self._cache: SlotCache | None = None

    @property
    def cache(self) -> SlotCache:
        if self._cache is None:
            raise ConfigError("the model has no cache yet; call reserve(pages) first")
        return self._cache

    def reserve(self, pages: int) -> None:
        self._cache = SlotCache(self.spec.layout, pages, self)

    def freeze(self, slot: Slot) -> None:
        """Turns a slot's share of a running group into rows of fixed tensors."""
        if slot.group is None:
            return
        group = slot.group
        source = self._snapshot(group)
        for row, member in enumerate(group.slots):
            if member.group is group:
                member.source, member.row, member.group = source, row, None

    def _snapshot(self, group: Group) -> Source:
        assert self.abilities.style is not None
        return Source(self.abilities.style.leaves(group.past), self.abilities.axes, group.kept)

    def forward(self, batch: Batch) -> Output:
        jobs = self._jobs(batch)
        if any(job.start == 0 for job in jobs):
            self._caller.check_weights()
        wanted = np.zeros(len(batch.token_ids), dtype=bool)
        wanted[batch.logit_rows] = True
        logits = np.empty((len(batch.logit_rows), self.spec.vocabulary_size), dtype=np.float32)
        hidden = np.zeros((len(batch.logit_rows), self.spec.hidden_size), dtype=np.float32)
        target = np.full(len(batch.token_ids), -1, dtype=np.int64)
        target[batch.logit_rows] = np.arange(len(batch.logit_rows))
        for together in self._partition(jobs):
            for job, rows, hidden_rows in self._run(together, wanted):
                for offset in np.flatnonzero(wanted[job.first_row : job.first_row + len(job.new)]):
                    behind = offset - len(
                        job.new
                    )  # counted from the end: a module may answer for the last position only
                    if -behind > len(rows):
                        raise UnsupportedError(
                            f"{describe(self.module)} gives the logits of the last position only; "
                            "this needs those of earlier ones"
                        )
                    logits[target[job.first_row + offset]] = rows[behind]
                    if hidden_rows is not None:
                        hidden[target[job.first_row + offset]] = hidden_rows[behind]
        return Output(logits, hidden)

    def _jobs(self, batch: Batch) -> list[Job]:
        jobs = []
        starts = batch.sequence_starts.tolist()
        for s, (first, last) in enumerate(pairwise(starts)):
            slot = self.cache.slots[batch.pages[batch.page_starts[s]]]
            start = int(batch.positions[first])
            if start == 0:
                slot.group, slot.source, slot.tokens = None, None, []
                slot.condition = batch.conditions[s] if batch.conditions else None
            elif start > len(slot.tokens):
                raise ModelError(f"position {start} follows {len(slot.tokens)} tokens; expected no gap")
            elif start < len(slot.tokens):
                self.freeze(slot)
                del slot.tokens[start:]
            jobs.append(Job(slot, start, batch.token_ids[first:last].tolist(), first))
        return jobs

    def _partition(self, jobs: list[Job]) -> list[list[Job]]:
        """Which sequences can share a call: all, where a mask tells padding from text, else those of equal shape."""
        able = self.abilities
        parts: dict[Any, list[Job]] = {}
        for job in jobs:
            key: Any
            if able.style is None:
                key = (job.start, len(job.new)) if able.last_only else None
            elif job.start == 0 and not able.last_only:
                key = "fresh"  # right padding is exact for a causal module
            elif able.gaps:
                key = len(job.new)
            else:
                key = (job.start, len(job.new))
            parts.setdefault(key, []).append(job)
        return list(parts.values())

    def _run(self, jobs: list[Job], wanted: npt.NDArray[np.bool_]) -> list[tuple[Job, Any, Any]]:
        """(job, logits of its last rows, hidden states of them) for sequences that share one call."""
        able = self.abilities
        if able.last_only and any(wanted[job.first_row : job.first_row + len(job.new) - 1].any() for job in jobs):
            return self._token_by_token(jobs, wanted)
        if able.style is None:
            return self._recompute(jobs)
        if jobs[0].start and len(jobs[0].new) > 1 and not able.chunks:
            return self._token_by_token(jobs, wanted)
        return self._continue(jobs, wanted)

    def _recompute(self, jobs: list[Job]) -> list[tuple[Job, Any, Any]]:
        for job in jobs:
            job.slot.tokens += job.new
        ids, _ = self._pad([job.slot.tokens for job in jobs])
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        logits = self._caller(ids, positions=positions).logits
        return self._split(jobs, logits, [len(job.slot.tokens) for job in jobs])

    def _token_by_token(self, jobs: list[Job], wanted: npt.NDArray[np.bool_]) -> list[tuple[Job, Any, Any]]:
        collected: list[tuple[list[Any], list[Any]]] = [([], []) for _ in jobs]
        for offset in range(len(jobs[0].new)):
            singles = [Job(j.slot, j.start + offset, j.new[offset : offset + 1], j.first_row + offset) for j in jobs]
            for (rows, hidden_rows), (_, row, hidden_row) in zip(collected, self._run(singles, wanted), strict=True):
                rows.append(row)
                if hidden_row is not None:
                    hidden_rows.append(hidden_row)
        return [
            (job, np.concatenate(rows), np.concatenate(hidden_rows) if hidden_rows else None)
            for job, (rows, hidden_rows) in zip(jobs, collected, strict=True)
        ]

    def _continue(self, jobs: list[Job], wanted: npt.NDArray[np.bool_]) -> list[tuple[Job, Any, Any]]:
        style = self.abilities.style
        assert style is not None
        past, kept, lanes = self._assemble(jobs)
        lengths = [len(job.new) for job in jobs]
        if self.abilities.grows and jobs[0].start:
            held = style.leaves(past)
            leaves, lanes = make_room(held, self.abilities.axes, lanes, lengths[0], self._caller.few)
            if any(a is not b for a, b in zip(leaves, held, strict=True)):
                past = style.replace(past, leaves, max(job.start for job in jobs))
        ids, new_kept = self._pad([job.new for job in jobs])
        longest = ids.shape[1]
        positions = torch.tensor([[*range(job.start, job.start + longest)] for job in jobs], device=ids.device)
        last_only = new_kept is None and not any(
            wanted[job.first_row : job.first_row + len(job.new) - 1].any() for job in jobs
        )
        heeds_mask = self.abilities.gaps  # otherwise padding stands only at the end, where causality hides it
        logits, past = advance(
            self._caller, style, ids, past, positions, kept, new_kept if heeds_mask else None, last_only=last_only
        )
        if kept is not None or new_kept is not None:
            before = (
                kept if kept is not None else torch.ones(len(jobs), jobs[0].start, dtype=torch.bool, device=ids.device)
            )
            after = new_kept if new_kept is not None else torch.ones_like(ids, dtype=torch.bool)
            kept = torch.cat((before, after), dim=1)
        group = Group(past, [job.slot for job in jobs], kept, lanes)
        for job in jobs:
            job.slot.tokens += job.new
            job.slot.group, job.slot.source = group, None
        if new_kept is not None:
            self.freeze(jobs[0].slot)  # texts go on behind their last token, not behind padding
        return self._split(jobs, logits, lengths)

    def _assemble(self, jobs: list[Job]) -> tuple[Any, Tensor | None, list[Lane]]:
        """The cache of these sequences' earlier tokens in the module's form, which positions are real, its lanes."""
        style = self.abilities.style
        assert style is not None
        if jobs[0].start == 0:
            return style.empty(), None, []
        group = jobs[0].slot.group
        if group is not None and group.is_exactly(jobs):
            return group.past, group.kept, group.lanes
        parts = []
        for job in jobs:
            self.freeze(job.slot)
            assert job.slot.source is not None
            parts.append((job.slot.source, job.slot.row, job.start))
        leaves, kept = gather(parts)
        return style.build(leaves, max(job.start for job in jobs)), kept, []

    def _pad(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Token ids side by side, zeros behind the shorter ones, and which are real (None: all)."""
        longest = max(map(len, sequences))
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=self._caller.device)
        if all(len(ids) == longest for ids in sequences):
            return ids, None
        ends = torch.tensor([len(ids) for ids in sequences], device=ids.device)
        return ids, torch.arange(longest, device=ids.device) < ends[:, None]

    def _split(self, jobs: list[Job], logits: Tensor, lengths: list[int]) -> list[tuple[Job, Any, Any]]:
        if logits.shape[-1] != self.spec.vocabulary_size:
            raise ModelError(
                f"{describe(self.module)} returned {logits.shape[-1]} logits; before, {self.spec.vocabulary_size}"
            )
        hidden = self._caller.hidden
        answers = []
        for row, (job, length) in enumerate(zip(jobs, lengths, strict=True)):
            end = length if logits.shape[1] >= length else logits.shape[1]
            begin = max(0, end - len(job.new))
            kept_hidden = (
                None if hidden is None else hidden[row, max(0, hidden.shape[1] - logits.shape[1]) :][begin:end]
            )
            answers.append((job, _array(logits[row, begin:end]), None if kept_hidden is None else _array(kept_hidden)))
        return answers


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return np.asarray(tensor.float().cpu().numpy())


def adapt(
    module: nn.Module,
    *,
    device: str | None = None,
    use_kv_cache: bool = True,
    context_length: int | None = None,
    vocabulary_size: int | None = None,
) -> ForeignModel:
    """Makes any causal nn.Module that returns logits a `Model`.

    forward(input_ids (batch, time) int64), also with attention_mask, position_ids and a cache; see
    mnemos.models.foreign.cache_styles for the styles. The module is tried once on a few tokens. context_length: the
    positions of a module that does not say itself how many it has. vocabulary_size: of the tokenizer, must not exceed
    the module's. Errors: ModelError with the module's class and signature.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model is a {type(module).__name__}; expected a torch.nn.Module or a mnemos Model")
    caller = Caller(module)
    if device is not None and _device(device).type != caller.device.type:
        raise ConfigError(
            f"{type(module).__name__} has its parameters on {caller.device} but device is {device!r}; "
            f"expected device={str(caller.device)!r}, or move the module with .to({device!r}) first"
        )
    empty = next((name for name, p in module.named_parameters() if p.device.type == "meta"), None)
    if empty is not None:
        raise ModelError(f"{describe(module)} has no values for {empty} (its device is meta); expected loaded weights")
    inner = caller.inner
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        from mnemos.models.foreign.encoder_decoder import adapt_encoder_decoder

        return adapt_encoder_decoder(inner, caller, context_length)
    abilities = Probe(caller).run(use_kv_cache)
    caller.settle()
    if vocabulary_size is not None and vocabulary_size > abilities.vocabulary:
        raise ModelError(
            f"the tokenizer has {vocabulary_size} tokens but {describe(module)} returns {abilities.vocabulary} logits; "
            "expected at least as many logits as tokens"
        )
    if use_kv_cache and abilities.style is None:
        warnings.warn(
            f"{type(module).__name__} has no cache that can be used: every token runs over the whole text again, which "
            "is slow. Give forward a past_kv argument and return (logits, past_kv), or use CachedAttention.",
            stacklevel=3,
        )
    context = find_context(inner, abilities.reach, context_length)
    spec = ModelSpec(
        architecture=type(module).__name__,
        vocabulary_size=abilities.vocabulary,
        context_length=context,
        hidden_size=abilities.hidden_size,
        layout=KVLayout(1, 1, 1, page_size=context, dtype="float32"),
        **special_tokens(inner, abilities.vocabulary),
        parameters=sum(p.numel() for p in module.parameters()),
    )
    return ForeignModel(module, abilities, caller, spec)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {name!r}; expected a device of PyTorch, such as 'cpu', 'cuda' or 'mps'"
        ) from error
