"""Calls of a causal module: with its cache, or over the whole text again where it has none that can be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.models.foreign.cache_styles import CacheStyle, Snapshot, side_by_side
from mnemos.models.foreign.call import Caller, advance
from mnemos.models.foreign.growing_cache import Buffer, make_room
from mnemos.models.foreign.jobs import Bools, Job, JobOutput, pad, split
from mnemos.models.foreign.probe import Abilities
from mnemos.models.foreign.slots import Group


class CausalCalls:
    """Calls a module within what it was found to be able to do."""

    def __init__(self, caller: Caller, abilities: Abilities) -> None:
        self.caller = caller
        self.abilities = abilities

    def partition(self, jobs: list[Job]) -> list[list[Job]]:
        """Which sequences can share a call: all, where a mask tells padding from text, else those of equal shape."""
        if len(jobs) == 1:
            return [jobs]
        able = self.abilities
        parts: dict[Any, list[Job]] = {}
        for job in jobs:
            key: Any
            if able.style is None:
                key = (job.start, len(job.new)) if able.last_only else None
            elif job.start == 0 and not able.last_only:
                key = "fresh"  # padding on the right is exact for a causal module
            elif able.gaps:
                key = len(job.new)
            else:
                key = (job.start, len(job.new))
            parts.setdefault(key, []).append(job)
        return list(parts.values())

    def run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """One call for all, or one for each position where the module can do no better."""
        able = self.abilities
        if able.last_only and any(job.wants_earlier(wanted) for job in jobs):
            return self._token_by_token(jobs, wanted)
        if able.style is None:
            return self._recompute(jobs)
        if jobs[0].start and len(jobs[0].new) > 1 and not able.chunks:
            return self._token_by_token(jobs, wanted)
        return self._continue(jobs, able.style, wanted)

    def _recompute(self, jobs: list[Job]) -> list[JobOutput]:
        for job in jobs:
            job.slot.tokens += job.new
        ids, _ = pad([job.slot.tokens for job in jobs], self.caller.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        logits = self.caller(ids, positions=positions).logits
        return self._split(jobs, logits, [len(job.slot.tokens) for job in jobs])

    def _token_by_token(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        steps = []
        for offset in range(len(jobs[0].new)):
            singles = [Job(j.slot, j.start + offset, j.new[offset : offset + 1], j.first_row + offset) for j in jobs]
            steps.append(self.run(singles, wanted))
        outputs = []
        for job, singly in zip(jobs, zip(*steps, strict=True), strict=True):
            hidden = [output.hidden for output in singly if output.hidden is not None]
            logits = np.concatenate([output.logits for output in singly])
            outputs.append(JobOutput(job, logits, np.concatenate(hidden) if hidden else None))
        return outputs

    def _continue(self, jobs: list[Job], style: CacheStyle, wanted: Bools) -> list[JobOutput]:
        past, real, buffers = self._assemble(jobs, style)
        if self.abilities.grows and jobs[0].start:
            held = style.leaves(past)
            leaves, buffers = make_room(held, self.abilities.axes, buffers, len(jobs[0].new), self.caller.native)
            if any(a is not b for a, b in zip(leaves, held, strict=True)):
                past = style.replace(past, leaves, max(job.start for job in jobs))
        ids, new_real = pad([job.new for job in jobs], self.caller.device)
        longest = ids.shape[1]
        positions = torch.tensor([[*range(job.start, job.start + longest)] for job in jobs], device=ids.device)
        last_only = new_real is None and not any(job.wants_earlier(wanted) for job in jobs)
        # A module that heeds no mask has padding at the end only, where causality hides it.
        shown = new_real if self.abilities.gaps else None
        logits, past = advance(self.caller, style, ids, past, positions, real, shown, last_only=last_only)
        if real is not None or new_real is not None:
            before, after = real, new_real
            if before is None:
                before = torch.ones(len(jobs), jobs[0].start, dtype=torch.bool, device=ids.device)
            if after is None:
                after = torch.ones_like(ids, dtype=torch.bool)
            real = torch.cat((before, after), dim=1)
        group = Group(past, [job.slot for job in jobs], self._snapshot, real, buffers)
        for job in jobs:
            job.slot.tokens += job.new
            job.slot.group, job.slot.snapshot = group, None
        if new_real is not None:
            jobs[0].slot.freeze()  # texts go on after their last token, not after padding
        return self._split(jobs, logits, [len(job.new) for job in jobs])

    def _snapshot(self, group: Group) -> Snapshot:
        assert self.abilities.style is not None
        return Snapshot(self.abilities.style.leaves(group.past), self.abilities.axes, group.real)

    def _assemble(self, jobs: list[Job], style: CacheStyle) -> tuple[Any, Tensor | None, list[Buffer]]:
        """The cache of these sequences' earlier tokens in the module's form, which positions are real, its buffers."""
        if jobs[0].start == 0:
            return style.empty(), None, []
        group = jobs[0].slot.group
        if group is not None and group.is_exactly([job.slot for job in jobs]):
            return group.past, group.real, group.buffers
        parts = []
        for job in jobs:
            job.slot.freeze()
            assert job.slot.snapshot is not None
            parts.append((job.slot.snapshot, job.slot.row, job.start))
        leaves, real = side_by_side(parts)
        return style.build(leaves, max(job.start for job in jobs)), real, []

    def _split(self, jobs: list[Job], logits: Tensor, lengths: list[int]) -> list[JobOutput]:
        return split(jobs, logits, lengths, self.caller, self.abilities.vocabulary)
