"""Steps of one token a sequence as CUDA graphs: a single launch where a step has hundreds of small kernels.

A graph is recorded for a number of sequences and of pages that each has, both rounded up, so that there are few. What
is missing to those numbers reads and writes the cache's last page, which no table names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from mnemos.contract import Batch, KVLayout
from mnemos.ops.torch_batch import Sizes, TorchBatch, packed

MOST_ROWS = 256
FEWEST_PAGES = 8
SEEN = 1  # steps of a shape that run as they are, before one is recorded
Run = Callable[[TorchBatch], Sequence[Tensor]]
Recorded = Callable[[], Sequence[Tensor]]


class DecodeGraphs:
    """The graphs of one model. record: makes a call that repeats what its first call does, by default a CUDA graph."""

    def __init__(
        self, run: Run, layout: KVLayout, pages: Sequence[int], device: torch.device, record: Any = None
    ) -> None:
        """pages: in each layer group, those that tables name; the cache has one more."""
        self._run, self._layout, self._device = run, layout, device
        self._unused = tuple(pages)
        self._recorded: dict[Sizes, tuple[_Inputs, Recorded]] = {}
        self._seen: Counter[Sizes] = Counter()
        self._record = record or Recorder()

    def step(self, batch: Batch) -> list[Tensor] | None:
        """What `run` returns for a batch, on the device; None where it is better run as it is."""
        rows = batch.sequences
        one_each = len(batch.token_ids) == rows == len(batch.logit_rows)
        if self._record is None or not one_each or rows > MOST_ROWS:
            return None
        sizes = _rounded(Sizes.of(batch, self._layout))
        if sizes not in self._recorded:
            self._seen[sizes] += 1
            if self._seen[sizes] <= SEEN:
                return None
            inputs = _Inputs(sizes, self._layout, self._unused, self._device)
            inputs.fill(batch)
            try:
                self._recorded[sizes] = inputs, self._record(lambda: self._run(inputs.batch(batch)))
            except torch.OutOfMemoryError:  # the steps themselves may still have room
                self._record = None
                return None
        inputs, repeat = self._recorded[sizes]
        inputs.fill(batch)
        return [output[:rows] for output in repeat()]


class _Inputs:
    """What a recorded step reads: one piece of memory on the device, filled by one copy."""

    def __init__(self, sizes: Sizes, layout: KVLayout, unused: tuple[int, ...], device: torch.device) -> None:
        self._sizes, self._layout, self._unused = sizes, layout, unused
        self._host = torch.zeros(sum(sizes.parts), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)

    def fill(self, batch: Batch) -> None:
        """Copies a batch's numbers; the copy before has been read, as its results have."""
        self._host.copy_(torch.from_numpy(packed(batch, self._layout, self._sizes, self._unused)))
        self._device.copy_(self._host, non_blocking=True)

    def batch(self, host: Batch) -> TorchBatch:
        """The batch that a recorded step is given."""
        return TorchBatch.unpacked(self._device, self._sizes, self._layout, host)


class Recorder:
    """Records CUDA graphs, which share their memory, as one ends before the next begins."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> Recorded:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # what libraries do once, they do now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        shared = self._pool if len(self._graphs) else None  # that of graphs that are gone cannot be used again
        with torch.cuda.graph(graph, pool=shared, capture_error_mode="thread_local"):
            outputs = run()
        self._pool = graph.pool()
        self._graphs.add(graph)

        def repeat() -> Sequence[Tensor]:
            graph.replay()
            return outputs

        return repeat


def _rounded(sizes: Sizes) -> Sizes:
    """The next powers of two, of pages at least FEWEST_PAGES."""
    rows = power(sizes.rows)
    return Sizes(rows, rows, rows, tuple(max(FEWEST_PAGES, power(count)) for count in sizes.pages))


def power(count: int) -> int:
    """The next power of two, at least `count`: there are few of them to record."""
    return 1 << (count - 1).bit_length()
