"""A batch on PyTorch's device, where one copy takes it: its rows, and the pages of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mnemos.contract import Batch, Ints, KVLayout

NOT_SEEN = int(np.iinfo(np.int32).max)  # a position beyond every row's


@dataclass(frozen=True)
class Sizes:
    """How much room a batch takes: rows, rows whose logits are wanted, sequences, and pages in each layer group."""

    rows: int
    wanted: int
    sequences: int
    pages: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, layout: KVLayout) -> Sizes:
        """What the batch needs: the pages of the sequence that has the most."""
        counts = np.diff(batch.page_starts).reshape(batch.sequences, len(layout.groups))
        pages = tuple(int(most) for most in counts.max(axis=0, initial=1))
        return cls(len(batch.token_ids), len(batch.logit_rows), batch.sequences, pages)

    @property
    def parts(self) -> list[int]:
        """The lengths of what `packed` puts one after the other."""
        tables = [self.sequences * count for count in self.pages for _ in range(2)]
        return [self.rows, self.rows, self.rows, self.wanted, self.sequences + 1, *tables]


@dataclass(frozen=True)
class Together:
    """Sequences with equally many new tokens, whose attention is one call.

    rows (S, new): their rows in the batch, at `positions` (S, new); slots (S, longest): the cache slots of their pages'
    content, flat over pages, at the positions `held` (S, longest). Slots that no row sees hold NOT_SEEN. whole: the
    rows are the batch's, in order.
    """

    rows: Tensor
    positions: Tensor
    slots: Tensor
    held: Tensor
    whole: bool = False
    _visible: dict[int, Tensor] = field(default_factory=dict)

    def visible(self, window: int) -> Tensor:
        """(S, 1, new, longest) bool: what each row sees within a window, 0: without one; once for all layers."""
        if window not in self._visible:
            distance = self.positions[:, None, :, None] - self.held[:, None, None, :]
            seen = distance >= 0
            self._visible[window] = seen & (distance < window) if window else seen
        return self._visible[window]


@dataclass(frozen=True)
class TorchTables:
    """A batch's page tables in one layer group, int32.

    pages (S, P) and the first position that each holds, firsts (S, P): NOT_SEEN where a sequence has fewer pages.
    """

    pages: Tensor
    firsts: Tensor


@dataclass(frozen=True)
class TorchBatch:
    """A `Batch` on the device, int32. host: the batch itself; where a step is recorded, the one it was recorded of.

    token_ids, positions and owners (T,): each row's sequence; logit_rows (R,); starts (S+1,): see `Batch`; tables: of
    each layer group, whose pages have `page_size` positions; longest: the most new tokens of a sequence.
    """

    token_ids: Tensor
    positions: Tensor
    owners: Tensor
    logit_rows: Tensor
    starts: Tensor
    tables: list[TorchTables]
    page_size: int
    longest: int
    host: Batch
    _parts: dict[int, list[Together]] = field(default_factory=dict)
    _new_slots: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, layout: KVLayout, device: torch.device) -> TorchBatch:
        """A batch as it is."""
        sizes = Sizes.of(batch, layout)
        flat = torch.from_numpy(packed(batch, layout, sizes)).to(device)
        return cls.unpacked(flat, sizes, layout, batch)

    @classmethod
    def unpacked(cls, flat: Tensor, sizes: Sizes, layout: KVLayout, host: Batch) -> TorchBatch:
        """Views of what `packed` has put into `flat`."""
        ids, positions, owners, wanted, starts, *rest = flat.split(sizes.parts)  # type: ignore[no-untyped-call]
        pages, firsts = ([part.view(sizes.sequences, -1) for part in rest[side::2]] for side in (0, 1))
        tables = [TorchTables(*pair) for pair in zip(pages, firsts, strict=True)]
        longest = int(np.diff(host.sequence_starts).max(initial=0))
        return cls(ids, positions, owners, wanted, starts, tables, layout.page_size, longest, host)

    def new_slots(self, group: int) -> Tensor:
        """(T,) int64: where in the cache each row's key and value are stored, flat over pages; once for all layers."""
        if group not in self._new_slots:
            tables, owners = self.tables[group], self.owners.long()
            place = (tables.firsts[owners] <= self.positions[:, None]).sum(1, keepdim=True) - 1
            page = tables.pages[owners].gather(1, place)[:, 0].long()
            self._new_slots[group] = page * self.page_size + self.positions % self.page_size
        return self._new_slots[group]

    def parts(self, group: int) -> list[Together]:
        """Attention's calls where one takes sequences with equally many new tokens; found once for all layers."""
        if group not in self._parts:
            tables, within = self.tables[group], torch.arange(self.page_size, device=self.starts.device)
            slots = (tables.pages.long()[:, :, None] * self.page_size + within).flatten(1)
            unseen = (tables.firsts == NOT_SEEN)[:, :, None]
            held = (tables.firsts[:, :, None] + within).masked_fill(unseen, NOT_SEEN).flatten(1)
            self._parts[group] = [self._part(slots, held, *one) for one in self._together()]
        return self._parts[group]

    def _together(self) -> list[tuple[Tensor, Tensor | None]]:
        """The rows of the sequences of each part, (S, new), and which sequences they are; None: all."""
        device = self.starts.device
        counts = np.diff(self.host.sequence_starts)
        if (counts == self.longest).all():  # also where a step is recorded, which has more sequences than its host
            return [(torch.arange(len(self.token_ids), device=device).view(-1, self.longest), None)]
        parts: list[tuple[Tensor, Tensor | None]] = []
        for count in np.unique(counts):
            members = np.flatnonzero(counts == count)
            rows = self.host.sequence_starts[members][:, None] + np.arange(count)
            parts.append((torch.from_numpy(rows).to(device), torch.from_numpy(members).to(device)))
        return parts

    def _part(self, slots: Tensor, held: Tensor, rows: Tensor, members: Tensor | None) -> Together:
        if members is not None:
            slots, held = slots[members], held[members]
        return Together(rows, self.positions[rows], slots, held, whole=members is None)


def packed(batch: Batch, layout: KVLayout, sizes: Sizes, unused: tuple[int, ...] = ()) -> Ints:
    """All that a step reads of a batch, one after the other: see `TorchBatch`.

    `sizes` may be larger than the batch if it has one row a sequence: the rows that are added then belong to sequences
    whose only page is the `unused` one of each layer group.
    """
    rows, groups, added = len(batch.token_ids), len(layout.groups), sizes.sequences - batch.sequences
    owners = np.repeat(np.arange(batch.sequences, dtype=np.int32), np.diff(batch.sequence_starts))
    more = np.arange(added, dtype=np.int32)
    parts = [
        _filled(batch.token_ids, sizes.rows),
        _filled(batch.positions, sizes.rows),
        np.concatenate([owners, batch.sequences + more]),
        np.concatenate([batch.logit_rows, rows + more]),
        np.concatenate([batch.sequence_starts, rows + 1 + more]),
    ]
    begins, ends = (side.reshape(-1, groups) for side in (batch.page_starts[:-1], batch.page_starts[1:]))
    for group, width in enumerate(sizes.pages):
        there = np.arange(width) < (ends - begins)[:, group, None]
        index = np.where(there, begins[:, group, None] + np.arange(width), 0)
        pages = np.full((sizes.sequences, width), unused[group] if unused else 0, np.int32)
        firsts = np.full((sizes.sequences, width), NOT_SEEN, np.int32)
        np.copyto(pages[: batch.sequences], batch.pages[index], where=there)
        np.copyto(firsts[: batch.sequences], batch.page_positions[index], where=there)
        firsts[batch.sequences :, 0] = 0
        parts += [pages.reshape(-1), firsts.reshape(-1)]
    return np.concatenate(parts)


def _filled(values: Ints, size: int) -> Ints:
    whole = np.zeros(size, dtype=np.int32)
    whole[: len(values)] = values
    return whole
