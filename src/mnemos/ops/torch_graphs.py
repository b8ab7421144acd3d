"""Steps of one token a sequence as CUDA graphs: a single launch where a step has hundreds of small kernels.

A graph is recorded for a number of sequences and of positions that they see, both rounded up, so that there are few.
What is missing to those numbers writes to the cache's last page, which no table names, and is seen by no one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.contract import Batch, KVLayout
from mnemos.ops.torch_batch import Int64s, Together, TorchBatch, TorchTables, find_slots, padded

MOST_ROWS = 256
FEWEST_POSITIONS = 128
SEEN = 3  # steps of a shape that run as they are, before one is recorded
Run = Callable[[TorchBatch], Sequence[Tensor]]
Recorded = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Shape:
    """rows: sequences; lengths: in each layer group, the positions that a sequence sees."""

    rows: int
    lengths: tuple[int, ...]


class DecodeGraphs:
    """The graphs of one model. record: makes a call that repeats what its first call does, by default a CUDA graph."""

    def __init__(
        self, run: Run, layout: KVLayout, pages: Sequence[int], device: torch.device, record: Any = None
    ) -> None:
        """pages: in each layer group, those that tables name; the cache has one more."""
        self._run, self._layout, self._device = run, layout, device
        self._unused = [count * layout.page_size for count in pages]
        self._recorded: dict[Shape, tuple[_Inputs, Recorded]] = {}
        self._seen: Counter[Shape] = Counter()
        self._record = record or _Recorder()

    def step(self, batch: Batch) -> list[Tensor] | None:
        """What `run` returns for a batch, on the device; None where it is better run as it is."""
        rows = batch.sequences
        one_each = len(batch.token_ids) == rows == len(batch.logit_rows)
        if self._record is None or not one_each or rows > MOST_ROWS:
            return None
        places = [find_slots(batch, self._layout, group) for group in range(len(self._layout.groups))]
        lengths = (max(len(slots) for slots, _ in found) for _, found in places)
        shape = Shape(_rounded(rows, 1), tuple(_rounded(length, FEWEST_POSITIONS) for length in lengths))
        self._seen[shape] += 1
        if shape not in self._recorded and self._seen[shape] <= SEEN:
            return None
        if shape not in self._recorded:
            inputs = _Inputs(shape, self._device)
            inputs.fill(batch, places, self._unused)
            try:
                self._recorded[shape] = inputs, self._record(lambda: self._run(inputs.batch(batch)))
            except torch.OutOfMemoryError:  # the steps themselves may still have room
                self._record = None
                return None
        inputs, repeat = self._recorded[shape]
        inputs.fill(batch, places, self._unused)
        return [output[:rows] for output in repeat()]


class _Inputs:
    """What a recorded step reads: one piece of memory on the device, filled by one copy."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        rows = shape.rows
        self._sizes = [rows, rows]
        for length in shape.lengths:
            self._sizes += [rows, rows * length, rows * length]
        self._host = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)
        self._rows = torch.arange(rows, device=device)

    def fill(
        self, batch: Batch, places: list[tuple[Int64s, list[tuple[Int64s, Int64s]]]], unused: Sequence[int]
    ) -> None:
        """Copies a batch's numbers; the copy before has been read, as its results have."""
        rows, most = batch.sequences, self.shape.rows
        parts = [_filled(batch.token_ids, most, 0), _filled(batch.positions, most, 0)]
        for (new_slots, found), length, slot in zip(places, self.shape.lengths, unused, strict=True):
            slots, held = padded(found, most, length, slot)
            held[rows:, 0] = 0
            parts += [_filled(new_slots, most, slot), slots, held]
        self._host.copy_(torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])))
        self._device.copy_(self._host, non_blocking=True)

    def batch(self, host: Batch) -> TorchBatch:
        """The batch that a recorded step is given."""
        token_ids, positions, *rest = self._device.split(self._sizes)  # type: ignore[no-untyped-call]
        tables = []
        for group, length in enumerate(self.shape.lengths):
            new_slots, slots, held = rest[3 * group : 3 * group + 3]
            shape = self.shape.rows, length
            part = Together(self._rows[:, None], positions[:, None], slots.view(shape), held.view(shape), whole=True)
            tables.append(TorchTables(new_slots, [part]))
        return TorchBatch(token_ids, positions, self._rows, tables, host)


class _Recorder:
    """Records CUDA graphs, which share their memory, as one ends before the next begins."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> Recorded:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # what libraries do once, they do now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        self._pool = graph.pool()

        def repeat() -> Sequence[Tensor]:
            graph.replay()
            return outputs

        return repeat


def _rounded(count: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _filled(values: Any, size: int, rest: int) -> Int64s:
    whole = np.full(size, rest, dtype=np.int64)
    whole[: len(values)] = values
    return whole
