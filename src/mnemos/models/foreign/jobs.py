"""Each sequence's part in one step, and the tensors that several of them share in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnemos.errors import ModelError
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.signature import describe
from mnemos.models.foreign.slots import Slot
from mnemos.ops.torch import on_host

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.float32]


@dataclass
class Job:
    """The tokens of one sequence that are run in this step, from position `start`.

    The last `rows` of them are the batch's, from its row `first_row` on; any before were run once and are again, as
    their cache is gone. greedy: of its one row only the most probable token is wanted.
    """

    slot: Slot
    start: int
    new: list[int]
    first_row: int
    rows: int
    greedy: bool = False

    def wants_earlier(self, wanted: Bools) -> bool:
        """Whether `wanted` (T,), of the batch's rows, holds any of this sequence but its last."""
        return bool(wanted[self.first_row : self.first_row + self.rows - 1].any())

    def again(self) -> Job:
        """The same with all earlier tokens before, for a sequence whose cache is gone."""
        tokens = self.slot.tokens
        self.slot.rewind(0)
        return Job(self.slot, 0, tokens + self.new, self.first_row, self.rows)


@dataclass
class JobOutput:
    """logits (rows, vocabulary) of the job's last positions, all or fewer; hidden (rows, hidden size) of the same.

    token: for a greedy job, which then may have logits (1, 0).
    """

    job: Job
    logits: Rows
    hidden: Rows | None
    token: int | None = None


class Calls(Protocol):
    """How the sequences of a step are run through a kind of module."""

    def partition(self, jobs: list[Job]) -> list[list[Job]]:
        """Which sequences can share a call."""

    def run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """Runs sequences that share a call; `wanted` (T,) says of which rows of the batch logits are asked for."""


def pad(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids (batch, time), zeros after the shorter ones, and which are real (None: all)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=device)
    if all(len(ids) == longest for ids in sequences):
        return ids, None
    ends = torch.tensor([len(ids) for ids in sequences], device=device)
    return ids, torch.arange(longest, device=device) < ends[:, None]


def split(jobs: list[Job], logits: Tensor, lengths: list[int], caller: Caller, vocabulary: int) -> list[JobOutput]:
    """Each job's part of the logits (batch, time or 1, vocabulary); `lengths`: the positions of each that were run.

    ModelError: the last axis of the logits is not `vocabulary`, or they are not of all positions or of the last.
    """
    if logits.shape[-1] != vocabulary:
        raise ModelError(f"{describe(caller.module)} returned {logits.shape[-1]} logits; before, {vocabulary}")
    if logits.shape[1] not in (1, max(lengths)) or len(logits) != len(jobs):
        raise ModelError(
            f"{describe(caller.module)} returned logits of shape {tuple(logits.shape)}; expected ({len(jobs)}, "
            f"{max(lengths)}, {vocabulary})"
        )
    answered = logits.shape[1]
    ends = [min(length, answered) for length in lengths]
    first = min(max(0, end - job.rows) for job, end in zip(jobs, ends, strict=True))
    wanted = [logits[:, first:]]
    if caller.hidden is not None:
        wanted.append(caller.hidden[:, max(0, caller.hidden.shape[1] - answered) :][:, first:])
    every, *read = on_host(*(tensor.detach().float() for tensor in wanted))
    outputs = []
    for row, (job, end) in enumerate(zip(jobs, ends, strict=True)):
        rows = slice(max(0, end - job.rows) - first, end - first)
        outputs.append(JobOutput(job, every[row, rows], read[0][row, rows] if read else None))
    return outputs
