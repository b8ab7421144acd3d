"""`ForeignModel`: a PyTorch module as a `Model`, with its own cache for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import nn

from mnemos.contract import Batch, ModelSpec, Output
from mnemos.errors import ConfigError, ModelError, UnsupportedError
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.jobs import Bools, Calls, Job, JobOutput, Rows
from mnemos.models.foreign.signature import describe
from mnemos.models.foreign.slots import Slots


class ForeignModel:
    """A module with a slot for each sequence; `calls` says which sequences share a call of it."""

    def __init__(self, caller: Caller, calls: Calls, spec: ModelSpec) -> None:
        self.module: nn.Module = caller.module
        self.spec = spec
        self.calls = calls
        self._caller = caller
        self._slots: Slots | None = None
        self._most: int | None = None  # sequences that a call may have, where the module was seen to take no more

    @property
    def slots(self) -> Slots:
        """What is kept of each sequence. ConfigError before `reserve_states`."""
        if self._slots is None:
            raise ConfigError("the model has no state slots yet; call reserve_states(slots) first")
        return self._slots

    def reserve_states(self, slots: int) -> None:
        """See `StatefulModel`, as for the next two."""
        self._slots = Slots(slots)

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Forks sequences."""
        self.slots.copy(sources, targets)

    def clear_states(self, slots: Sequence[int]) -> None:
        """Forgets sequences."""
        self.slots.clear(slots)

    def forward(self, batch: Batch) -> Output:
        """Runs the batch in as few calls as the module allows. ModelError: whatever the module raises."""
        jobs = self._jobs(batch)
        outputs: list[JobOutput] = []
        if any(job.start == 0 for job in jobs):
            self._caller.check_weights()
        wanted = np.zeros(len(batch.token_ids), dtype=bool)
        wanted[batch.logit_rows] = True
        for together in self.calls.partition(jobs):
            outputs += self._run(together, wanted)
        return self._output(batch, outputs, wanted)

    def _output(self, batch: Batch, outputs: list[JobOutput], wanted: Bools) -> Output:
        """The rows of all sequences together; of a greedy step their tokens, where all were found with their rows."""
        rows = len(batch.logit_rows)
        target = np.full(len(batch.token_ids), -1, dtype=np.int64)
        target[batch.logit_rows] = np.arange(rows)
        tokens = np.full(rows, -1, dtype=np.int32)
        found = bool(outputs) and all(output.token is not None for output in outputs)
        logits = np.empty((rows, 0 if found else self.spec.vocabulary_size), dtype=np.float32)
        hidden = np.zeros((rows, self.spec.hidden_size), dtype=np.float32)
        for output in outputs:
            first, count = output.job.first_row, output.job.rows
            for offset in np.flatnonzero(wanted[first : first + count]):
                row, place = self._row(output, offset - count), target[first + offset]
                if output.token is not None:
                    tokens[place] = output.token
                if not found:
                    logits[place] = output.logits[row] if output.token is None else _only(output.token, len(logits[0]))
                if output.hidden is not None:
                    hidden[place] = output.hidden[row]
        return Output(logits, hidden, tokens if found else None)

    def _run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """Runs sequences in one call, or in several where the module cannot take so many; how many is remembered.

        ModelError: it cannot take one of them alone either, or its state cannot go back to be run again.
        """
        most = self._most or len(jobs)
        if len(jobs) > most:
            parts = [jobs[first : first + most] for first in range(0, len(jobs), most)]
            return [output for part in parts for output in self._run(part, wanted)]
        try:
            return self.calls.run(jobs, wanted)
        except ModelError:
            if len(jobs) == 1 or not self.spec.rewinds:
                raise
        for job in jobs:
            job.slot.rewind(job.start)
        half = (len(jobs) + 1) // 2
        outputs = self._run(jobs[:half], wanted) + self._run(jobs[half:], wanted)
        self._most = min(self._most or half, half)
        return outputs

    def _row(self, output: JobOutput, from_end: int) -> int:
        """Checks that a row counted from the end is there: a module may answer for the last position only."""
        if -from_end > len(output.logits):
            raise UnsupportedError(
                f"{describe(self.module)} gives the logits of the last position only; this needs those of earlier ones"
            )
        return from_end

    def _jobs(self, batch: Batch) -> list[Job]:
        jobs = []
        starts = batch.sequence_starts.tolist()
        for state, (first, last) in zip(batch.states.tolist(), pairwise(starts), strict=True):
            slot = self.slots[state]
            start = int(batch.positions[first])
            if start > len(slot.tokens):
                raise ModelError(f"position {start} follows {len(slot.tokens)} tokens; expected no gap")
            slot.rewind(start)
            new = batch.token_ids[first:last].tolist()
            jobs.append(Job(slot, start, new, first, last - first, batch.greedy and len(new) == 1))
        return jobs


def _only(token: int, size: int) -> Rows:
    """Logits of which nothing is known but the most probable token."""
    row = np.full(size, -np.inf, dtype=np.float32)
    row[token] = 0
    return row
