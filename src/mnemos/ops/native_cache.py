"""What the native backend keeps of texts: pages of keys and values, and routers' windows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, KVLayout, Recall
from mnemos.errors import ConfigError
from mnemos.native import core as _native


class NativeCache:
    """Pages of keys and values in native memory; a page costs nothing until it is written."""

    def __init__(self, layout: KVLayout, pages: int | Sequence[int]) -> None:
        self.layout = layout
        self.pages = layout.counts(pages)
        self.cores = [
            _native.Cache(
                len(group.layers),
                layout.kv_heads,
                layout.head_dim,
                layout.page_size,
                layout.dtype,
                group_pages,
                None if group.window else _recall(layout, group.layers),
            )
            for group, group_pages in zip(layout.groups, self.pages, strict=True)
        ]

    def copy(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.cores[group].copy(int(source), int(target))

    def spill(self, folder: Path) -> None:
        """See `SpillingCache`. The file has no name, so it ends with the process."""
        import tempfile  # rarely needed

        for group, core in zip(self.layout.groups, self.cores, strict=True):
            if self.layout.recall is not None and not group.window:
                try:
                    with tempfile.TemporaryFile(dir=folder) as file:
                        core.spill_to(os.dup(file.fileno()))
                except OSError as error:
                    raise ConfigError(
                        f"memory: folder is {str(folder)!r}, where no file can be made: {error.strerror}; name one "
                        "that can be written to"
                    ) from error

    @property
    def spilled(self) -> int:
        """See `SpillingCache`."""
        return sum(core.spilled for core in self.cores)

    def begin_recall(self, recall: Recall) -> None:
        """See `RecallingCache`."""
        self.layout = replace(self.layout, recall=recall)
        for group, core in zip(self.layout.groups, self.cores, strict=True):
            fields = None if group.window else _recall(self.layout, group.layers)
            if fields is not None:
                core.begin_recall(fields)

    def recalled(self) -> Floats:
        """See `RecallingCache`."""
        layout = self.layout
        found = [
            core.recalled().reshape(2, len(g.layers), layout.kv_heads, -1)
            for g, core in zip(layout.groups, self.cores, strict=True)
        ]
        means = np.zeros((2, layout.layers, layout.kv_heads, max(own.shape[3] for own in found)), dtype=np.float32)
        for group, own in zip(layout.groups, found, strict=True):
            means[:, list(group.layers), :, : own.shape[3]] = own
        return means

    def read(self, page: int, group: int = 0) -> npt.NDArray[np.uint8]:
        return self.cores[group].read(page)

    def write(self, page: int, content: npt.NDArray[np.uint8], group: int = 0) -> None:
        self.cores[group].write(page, content)

    fill = write  # see `FillingCache`

    def release(self, pages: Sequence[int], group: int = 0) -> None:
        for page in pages:
            self.cores[group].release(page)


class NativeWindows:
    """Rows at the latest positions, in native memory; see `Windows`."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        self.core = _native.Windows(layers, width, length)

    def reserve(self, slots: int) -> None:
        self.core.reserve(slots)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.core.copy(int(source), int(target))

    def clear(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.core.clear(int(slot))


def _recall(
    layout: KVLayout, layers: Sequence[int]
) -> tuple[int, int, int, int, list[bool], list[int], list[list[int]], bool] | None:
    """A layout's `recall` for some layers, in pages: window, recalled, sinks and farthest; whether each head recalls,
    the components that are indexed, which of each head's queries name pages, and whether that is measured."""
    recall, size = layout.recall, layout.page_size
    if recall is None:
        return None
    heads = [head in recall.heads[layer] for layer in layers for head in range(layout.kv_heads)]
    sizes = recall.window // size, recall.recall // size, recall.sinks // size, recall.farthest // size
    naming = [list(recall.naming_of(layer, head)) for layer in layers for head in range(layout.kv_heads)]
    return *sizes, heads, list(recall.components), naming, recall.measured
