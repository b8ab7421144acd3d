"""Steps of one token of transformers' modules as CUDA graphs, with keys and values in memory of a fixed length.

A module of many small kernels waits for Python to launch them; a graph launches a step at once. What it reads and
writes must stay where it is: each sequence has a row of the `Arena`, as long as it only grows by single tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.models.foreign.cache_probe import CacheAbilities
from mnemos.models.foreign.cache_styles import HuggingFaceStyle, Snapshot
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.comparison import difference, tolerance
from mnemos.models.foreign.jobs import Job, JobOutput, Rows
from mnemos.models.foreign.slots import Group, Slot
from mnemos.ops.torch import RECORDS, on_host
from mnemos.ops.torch_graphs import MOST_ROWS, Recorder, power

LEAST_ROOM = 256  # positions
STEADY = 4  # steps after a fork or a return, before which the next one is likely to come soon
Run = Callable[[list[Job]], list[JobOutput]]
# What a graph holds stays as it is only where nothing but tensors decides what is computed.
_PLAIN = ("torch.nn.", "transformers.", "mnemos.", "torchao.")
_REACHES = ("window", "chunk", "local", "sparse")  # in a config's fields: attention may not see the whole text


def recorded_steps(caller: Caller, able: CacheAbilities, record: Any = None) -> RecordedSteps | None:
    """None for a module whose steps cannot be recorded. record: as for `DecodeGraphs`."""
    names, config = caller.signature, getattr(caller.inner, "config", None)
    suits = (
        caller.device.type in RECORDS
        and isinstance(able.style, HuggingFaceStyle)
        and able.gaps
        and all((axes.batch, axes.time) == (0, 2) for axes in able.axes)
        and names.mask is not None
        and names.positions is not None
        and names.offset is None
        and names.causal is None
        and _sees_all(config)
        and all(type(part).__module__.startswith(_PLAIN) for part in caller.module.modules())
    )
    return RecordedSteps(caller, able, record or Recorder()) if suits else None


def _sees_all(config: Any) -> bool:
    """Whether a config says that each layer's attention sees the whole text."""
    if config is None or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    fields = config.to_dict()
    return not any(value for name, value in fields.items() if any(word in name for word in _REACHES))


class RecordedSteps:
    """The graphs of one module. Each is compared with the module's own step when it is recorded, and else not used."""

    def __init__(self, caller: Caller, able: CacheAbilities, record: Any) -> None:
        self._caller, self._able, self._record = caller, able, record
        self._arena: Arena | None = None
        self._graphs: dict[int, Callable[[], Sequence[Tensor]]] = {}  # of the arena's first rows
        self._weights: list[int] = []
        self.works = True

    def takes(self, jobs: list[Job]) -> bool:
        """Whether these are steps of one token of sequences that have begun and have long gone on by single tokens."""
        return (
            self.works
            and len(jobs) <= MOST_ROWS
            and all(job.start > 0 and len(job.new) == 1 and job.slot.steady >= STEADY for job in jobs)
        )

    def run(self, jobs: list[Job], plainly: Run) -> list[JobOutput]:
        """A step that it takes. plainly: runs it as the module does."""
        arena = self._arena
        try:
            room = max(job.start for job in jobs) + 2  # with one that a row writes to while it waits
            if arena is None or room > arena.room or (arena.lacks(jobs) and (arena.is_full(jobs) or self._changed())):
                arena = self._made(jobs, room)
                self._leave()
                self._arena = arena
                self._weights = self._places()
            rows = arena.seat(jobs)
            arena.fill(rows, jobs)
            used = power(max(rows) + 1)
            if used not in self._graphs:
                return self._recorded(arena, used, rows, jobs, plainly)
            outputs = _outputs(jobs, rows, *self._graphs[used]())
        except torch.OutOfMemoryError:
            self._give_up()
            return plainly(jobs)
        for job in jobs:
            job.slot.tokens += job.new
            assert job.slot.group is not None
            job.slot.group.length += 1
        return outputs

    def _recorded(self, arena: Arena, used: int, rows: list[int], jobs: list[Job], plainly: Run) -> list[JobOutput]:
        """Runs a step as the module does, and records it; if both say the same, the next ones are recorded."""
        repeat: Callable[[], Sequence[Tensor]] | None = None
        with contextlib.suppress(Exception):  # whatever a module does that cannot be recorded
            repeat = self._record(lambda: self._step(arena, used))
        outputs = plainly(jobs)  # takes copies out of the arena
        if repeat is not None:
            logits, *_ = repeat()
            (every,) = on_host(logits.float())
            apart = max(
                difference(torch.from_numpy(every[row]), torch.from_numpy(other.logits[-1]))
                for row, other in zip(rows, outputs, strict=True)
            )
        if repeat is None or not apart <= tolerance(self._caller.module, logits):
            self._give_up()
            return outputs
        self._graphs[used] = repeat
        for job, row in zip(jobs, rows, strict=True):
            job.slot.freeze()
            arena.place(job.slot, row, job.start + 1)  # where the graph has left it
        return outputs

    def _step(self, arena: Arena, used: int) -> Sequence[Tensor]:
        """Of the arena's first rows the logits and what they were computed of, (used, width) each, the largest logits
        and their tokens, (used,). What they were computed of has no columns if nobody watches."""
        ids, positions = arena.inputs[:, :used]
        lowest = torch.finfo(arena.dtype).min
        unseen = torch.arange(arena.room, device=ids.device) > positions[:, None]
        mask = torch.zeros(unseen.shape, dtype=arena.dtype, device=ids.device).masked_fill(unseen, lowest)
        past = arena.cache(used, positions)
        answer = self._caller(
            ids[:, None], past=past, use_cache=True, mask=mask[:, None, None], positions=positions[:, None]
        )
        hidden, self._caller.hidden = self._caller.hidden, None  # which is the graph's own
        logits = answer.logits[:, -1]
        return logits, logits.new_empty(used, 0) if hidden is None else hidden[:, -1], *logits.max(-1)

    def _made(self, jobs: list[Job], room: int) -> Arena:
        rows, least = power(len(jobs)), LEAST_ROOM
        if self._arena is not None:
            rows, least = max(rows, self._arena.rows), self._arena.room
        for job in jobs:
            job.slot.freeze()
        first = jobs[0].slot.snapshot
        assert first is not None
        return Arena(first.leaves, rows, max(least, power(room)), self._able)

    def _places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._caller.module.parameters()]

    def _changed(self) -> bool:
        """Whether the module has other weights than those that were recorded."""
        return self._weights != self._places()

    def _leave(self) -> None:
        """Copies all sequences out of the arena and drops it with its graphs."""
        if self._arena is not None:
            self._arena.clear()
        self._arena = None
        self._graphs = {}

    def _give_up(self) -> None:
        self._leave()
        self.works = False


class _Row(Group):
    """A group of one sequence, in a row of an arena and in no form that a module takes."""

    def is_exactly(self, slots: list[Slot]) -> bool:
        """Never: it has to be copied out first."""
        return False


class Arena:
    """Keys and values (rows, heads, room, width) of a module's layers, a row for each sequence."""

    def __init__(self, like: list[Tensor], rows: int, room: int, able: CacheAbilities) -> None:
        """like: the leaves of a cache of the module."""
        self.rows, self.room, self.dtype = rows, room, like[0].dtype
        self._able = able
        self._leaves = [leaf.new_zeros((rows, leaf.shape[1], room, leaf.shape[3])) for leaf in like]
        self._groups: list[_Row | None] = [None] * rows
        self.inputs = torch.zeros((2, rows), dtype=torch.int64, device=like[0].device)  # ids and positions
        self._host = torch.zeros((2, rows), dtype=torch.int64, pin_memory=like[0].is_cuda)

    def lacks(self, jobs: list[Job]) -> int:
        """How many of the jobs' sequences have no row."""
        here = {id(group) for group in self._groups if group is not None}
        return sum(id(job.slot.group) not in here for job in jobs)

    def is_full(self, jobs: list[Job]) -> bool:
        """Whether there are too few rows for those that have none."""
        return self.lacks(jobs) > sum(self._is_free(row) for row in range(self.rows))

    def seat(self, jobs: list[Job]) -> list[int]:
        """The row of each job's sequence; those that have none get one, with a copy of what they have cached."""
        places = {id(group): row for row, group in enumerate(self._groups) if group is not None}
        found = []
        for job in jobs:
            row = places.get(id(job.slot.group))
            if row is None:
                row = next(row for row in range(self.rows) if self._is_free(row))
                job.slot.freeze()
                snapshot = job.slot.snapshot
                assert snapshot is not None
                for index, leaf in enumerate(self._leaves):
                    leaf[row, :, : job.start] = snapshot.row(index, job.slot.row, job.start)[0]
                self.place(job.slot, row, job.start)
            found.append(row)
        return found

    def place(self, slot: Slot, row: int, length: int) -> None:
        """The row holds the slot's first `length` positions from now on."""
        slot.group, slot.snapshot = _Row(None, [slot], self._take, length), None
        self._groups[row] = slot.group

    def fill(self, rows: list[int], jobs: list[Job]) -> None:
        """Sets ids and positions. Rows of other sequences write after their ends, where nothing is yet."""
        numbers = self._host.numpy()
        numbers[0] = 0
        numbers[1] = [0 if group is None else group.length for group in self._groups]
        numbers[0, rows] = [job.new[0] for job in jobs]
        self.inputs.copy_(self._host, non_blocking=True)

    def cache(self, used: int, positions: Tensor) -> Any:
        """transformers' cache over the first rows."""
        return _fixed_cache([leaf[:used] for leaf in self._leaves], positions)

    def clear(self) -> None:
        """Copies all sequences out."""
        for row in range(self.rows):
            group = self._groups[row]
            if group is not None and not self._is_free(row):
                group.slots[0].freeze()

    def _is_free(self, row: int) -> bool:
        group = self._groups[row]
        return group is None or group.slots[0].group is not group

    def _take(self, group: Group) -> Snapshot:
        row = next(row for row, one in enumerate(self._groups) if one is group)
        self._groups[row] = None
        leaves = [leaf[row : row + 1, :, : group.length].clone() for leaf in self._leaves]
        return Snapshot(leaves, self._able.axes, group.length)


def _fixed_cache(leaves: list[Tensor], positions: Tensor) -> Any:
    from transformers import cache_utils

    known: Any = cache_utils
    rows = torch.arange(len(positions), device=positions.device)

    class FixedLayer(known.DynamicLayer):  # type: ignore[misc]
        """Writes each row's key and value to its position and gives all there is."""

        def update(self, key_states: Tensor, value_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
            self.keys[rows, :, positions] = key_states[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, positions] = value_states[:, :, 0].to(self.values.dtype)
            return self.keys, self.values

    layers = []
    for key, value in zip(leaves[::2], leaves[1::2], strict=True):
        layer = FixedLayer()
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layer.dtype, layer.device = key.dtype, key.device
        layers.append(layer)
    return known.Cache(layers=layers)


def _outputs(
    jobs: list[Job], rows: list[int], logits: Tensor, hidden: Tensor, peaks: Tensor, tokens: Tensor
) -> list[JobOutput]:
    """What a graph has computed for the jobs in these rows; only tokens where all are greedy and logits are numbers."""
    if all(job.greedy for job in jobs):
        last, highest, found = on_host(hidden.float(), peaks.float(), tokens)
        if np.isfinite(highest[rows]).all():
            every = np.empty((len(last), 0), np.float32)
            chosen: list[int | None] = found.tolist()
            return _each(jobs, rows, every, last, chosen)
    every, last = on_host(logits.float(), hidden.float())
    return _each(jobs, rows, every, last, [None] * len(last))


def _each(jobs: list[Job], rows: list[int], logits: Rows, hidden: Rows, tokens: list[int | None]) -> list[JobOutput]:
    watched = hidden.shape[1] > 0
    return [
        JobOutput(job, logits[row : row + 1], hidden[row : row + 1] if watched else None, tokens[row])
        for job, row in zip(jobs, rows, strict=True)
    ]
