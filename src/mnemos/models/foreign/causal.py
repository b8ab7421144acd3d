"""Calls of a causal module: with its cache, or over the whole text again where it has none that can be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.models.foreign.cache_probe import CacheAbilities
from mnemos.models.foreign.cache_styles import Snapshot, side_by_side
from mnemos.models.foreign.call import Caller, advance
from mnemos.models.foreign.growing_cache import GrowingTensor, make_room
from mnemos.models.foreign.inner_cache import InnerStyle
from mnemos.models.foreign.jobs import Bools, Calls, Job, JobOutput, pad, split
from mnemos.models.foreign.probe import Abilities
from mnemos.models.foreign.recorded_steps import recorded_steps
from mnemos.models.foreign.slots import Group


def causal_calls(caller: Caller, abilities: Abilities) -> Calls:
    """The calls of a module that is able to do just that."""
    return RepeatedCalls(caller, abilities) if abilities.cache is None else CachedCalls(caller, abilities)


class RepeatedCalls:
    """Runs every sequence over all of its tokens in each step."""

    def __init__(self, caller: Caller, abilities: Abilities) -> None:
        self.caller = caller
        self.abilities = abilities

    def partition(self, jobs: list[Job]) -> list[list[Job]]:
        """All together: padding on the right is exact, unless the module answers for the last position only."""
        return _grouped(jobs, lambda job: (job.start, len(job.new)) if self.abilities.last_only else None)

    def run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """One call for all, or one for each position where the module answers for the last one only."""
        if self.abilities.last_only and any(job.wants_earlier(wanted) for job in jobs):
            return _token_by_token(self, jobs, wanted)
        for job in jobs:
            job.slot.tokens += job.new
        ids, _ = pad([job.slot.tokens for job in jobs], self.caller.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        logits = self.caller(ids, positions=positions).logits
        lengths = [len(job.slot.tokens) for job in jobs]
        return split(jobs, logits, lengths, self.caller, self.abilities.vocabulary)


class CachedCalls:
    """Runs new tokens only, with the module's cache put together from the slots."""

    def __init__(self, caller: Caller, abilities: Abilities) -> None:
        assert abilities.cache is not None
        self.caller = caller
        self.abilities = abilities
        self.able: CacheAbilities = abilities.cache
        # Whether some earlier positions are gone: in a state of fixed size, or in a cache that was seen to drop them.
        self._forgets = not self.able.rewinds
        self._times = [axes.time for axes in self.able.axes if axes.time is not None]
        self._inner = self.able.style if isinstance(self.able.style, InnerStyle) else None
        self._repeated = RepeatedCalls(caller, abilities)
        self._recorded = recorded_steps(caller, self.able)
        self._miscounts = False

    def partition(self, jobs: list[Job]) -> list[list[Job]]:
        """All together where a mask tells padding from text, else those of equal shape."""
        if self._forgets:
            jobs = [job if job.start == 0 or job.slot.holds(job.start) else job.again() for job in jobs]
        return _grouped(jobs, self._shape)

    def _repeats(self, job: Job) -> bool:
        """Whether it is evaluated over all tokens: it is longer than what is inside the module has room for."""
        inner = self._inner
        if inner is None or inner.extent is None:
            return self._miscounts
        return self._miscounts or job.start + len(job.new) > inner.extent

    def _shape(self, job: Job) -> Any:
        if self._repeats(job):
            return "repeated", *((job.start, len(job.new)) if self.abilities.last_only else ())
        if not self._forgets:
            if job.start == 0 and not self.abilities.last_only:
                return "fresh"  # padding on the right is exact for a causal module
            if self.able.gaps:
                return len(job.new)
        return job.start if self.able.aligned else job.start > 0, len(job.new)

    def run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """One call for all, or one for each position where the module can do no better."""
        if self._repeats(jobs[0]):
            for job in jobs:
                job.slot.drop()
            return self._repeated.run(jobs, wanted)
        silent = self.abilities.last_only and any(job.wants_earlier(wanted) for job in jobs)
        if silent or (jobs[0].start and len(jobs[0].new) > 1 and not self.able.chunks):
            return _token_by_token(self, jobs, wanted)
        if self._recorded is not None and not self._forgets and self._recorded.takes(jobs):
            return self._recorded.run(jobs, lambda jobs: self._continue(jobs, wanted))
        return self._continue(jobs, wanted)

    def _continue(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        style = self.able.style
        before = self._assemble(jobs)
        past, real, buffers = before.past, before.real, before.buffers
        if self.able.grows and jobs[0].start and not self._forgets:
            leaves, buffers = make_room(before.leaves, self._times, buffers, len(jobs[0].new), self.caller.native)
            if any(a is not b for a, b in zip(leaves, before.leaves, strict=True)):
                past = style.replace(past, leaves, max(job.start for job in jobs))
        ids, new_real = pad([job.new for job in jobs], self.caller.device)
        longest = ids.shape[1]
        positions = torch.tensor([[*range(job.start, job.start + longest)] for job in jobs], device=ids.device)
        last_only = new_real is None and not any(job.wants_earlier(wanted) for job in jobs)
        # A module that takes no mask sees padding at the end only, where causality hides it.
        shown = (real, new_real) if self.able.gaps else (None, None)
        logits, past = advance(self.caller, style, ids, past, positions, *shown, last_only=last_only)
        if real is not None or new_real is not None:
            shape = len(jobs), before.length
            real = torch.cat((_all_if_none(real, shape, ids), _all_if_none(new_real, ids.shape, ids)), dim=1)
        leaves, length = style.leaves(past), before.length + longest
        if self._inner is not None and not self._inner.counts_right(past, length):
            self._miscounts = True  # it did not in the trial: what it keeps of a text cannot be put back
        group = Group(past, [job.slot for job in jobs], self._snapshot, length, real, leaves, buffers)
        for job in jobs:
            job.slot.tokens += job.new
            job.slot.steady += len(job.new) == 1
            job.slot.group, job.slot.snapshot = group, None
        if not self._forgets and self._has_dropped(group):
            self._forgets = True
            jobs[0].slot.freeze()  # what is left of it has no gaps
        elif new_real is not None:
            jobs[0].slot.freeze()  # texts go on after their last token, not after padding
        return split(jobs, logits, [len(job.new) for job in jobs], self.caller, self.abilities.vocabulary)

    def _has_dropped(self, group: Group) -> bool:
        """Whether the module has dropped positions from its cache, as it may where it attends to a window."""
        return any(
            type(leaf) is not GrowingTensor and leaf.shape[time] < group.length  # a growing one holds all, and is slow
            for leaf, time in zip(group.leaves, self._times, strict=True)
        )

    def _snapshot(self, group: Group) -> Snapshot:
        leaves = group.leaves if self._inner is None else self._inner.trimmed(group.leaves, group.length)
        return Snapshot(leaves, self.able.axes, group.length, group.real)

    def _assemble(self, jobs: list[Job]) -> Group:
        """These sequences' earlier tokens as a group: with the cache in the module's form."""
        slots, style = [job.slot for job in jobs], self.able.style
        if jobs[0].start == 0:
            return Group(style.empty(), slots, self._snapshot, 0)
        group = slots[0].group
        if group is not None and group.is_exactly(slots):
            return group
        parts = []
        for job in jobs:
            job.slot.freeze()
            assert job.slot.snapshot is not None
            parts.append((job.slot.snapshot, job.slot.row, job.start))
        leaves, real = side_by_side(parts)
        longest = max(job.start for job in jobs)
        return Group(style.build(leaves, longest), slots, self._snapshot, longest, real, leaves)


def _grouped(jobs: list[Job], shape: Callable[[Job], Any]) -> list[list[Job]]:
    """Jobs of equal `shape` together."""
    if len(jobs) == 1:
        return [jobs]
    parts: dict[Any, list[Job]] = {}
    for job in jobs:
        parts.setdefault(shape(job), []).append(job)
    return list(parts.values())


def _token_by_token(calls: Calls, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
    """Runs jobs of equal length one position a call."""
    steps = []
    for offset in range(len(jobs[0].new)):
        singles = [
            Job(job.slot, job.start + offset, job.new[offset : offset + 1], job.first_row + offset, 1) for job in jobs
        ]
        steps.append(calls.run(singles, wanted))
    outputs = []
    for job, singly in zip(jobs, zip(*steps, strict=True), strict=True):
        hidden = [output.hidden for output in singly if output.hidden is not None]
        logits = np.concatenate([output.logits for output in singly])
        outputs.append(JobOutput(job, logits, np.concatenate(hidden) if hidden else None))
    return outputs


def _all_if_none(real: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=like.device) if real is None else real
