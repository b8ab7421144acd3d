"""What a foreign model keeps of each sequence: a slot, whose cache stays in the module's own form while it can.

A slot remembers which row of which cache tensors belongs to its sequence. As long as the same sequences run together,
their cache stays in the module's own form; only when the company changes are rows picked out and put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mnemos.models.foreign.cache_styles import Snapshot
from mnemos.models.foreign.growing_cache import Buffer


@dataclass
class Slot:
    """One sequence: its tokens so far and where its keys and values are: in a running group or in a snapshot's row.

    encoded: what an encoder made of its prompt; steady: steps of one token since it forked or returned, or many.
    """

    tokens: list[int] = field(default_factory=list)
    group: Group | None = None
    snapshot: Snapshot | None = None
    row: int = 0
    encoded: Tensor | None = None
    steady: int = 1 << 30

    def freeze(self) -> None:
        """Turns this sequence's share of a running group, and the others', into rows of fixed tensors."""
        group = self.group
        if group is None:
            return
        snapshot = group.take(group)
        for row, member in enumerate(group.slots):
            if member.group is group:
                member.snapshot, member.row, member.group = snapshot, row, None

    def holds(self, length: int) -> bool:
        """Whether the cache of the first `length` tokens is there; one that has no more than it needs may be gone."""
        return self.group is not None or (self.snapshot is not None and self.snapshot.holds(self.row, length))

    def drop(self) -> None:
        """Forgets its keys and values, but not its tokens."""
        self.freeze()
        self.snapshot = None

    def fork(self) -> Slot:
        """A slot that continues from here separately. No tensor is copied: modules replace theirs by longer ones."""
        self.freeze()
        self.steady = 0
        return Slot(list(self.tokens), None, self.snapshot, self.row, self.encoded, steady=0)

    def rewind(self, length: int) -> None:
        """Forgets the tokens after the first `length`; at 0 it restarts, with the encoder output of its prompt."""
        if length == 0:
            self.tokens, self.group, self.snapshot = [], None, None
        elif length < len(self.tokens):
            self.freeze()
            self.steady = 0
            del self.tokens[length:]


@dataclass
class Group:
    """Sequences that ran together last, with the cache in the module's own form.

    take: makes a snapshot of the group; length: the positions that its cache covers, padding included; real (batch,
    length) bool: which are not padding, None for all; leaves: the cache's tensors; buffers: their memory, once they
    have room to grow.
    """

    past: Any
    slots: list[Slot]
    take: Callable[[Group], Snapshot]
    length: int
    real: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def is_exactly(self, slots: list[Slot]) -> bool:
        """Whether these slots, in this order, are all that the group has, and none has gone another way."""
        same = list(map(id, self.slots)) == list(map(id, slots))
        return same and all(slot.group is self for slot in slots)


class Slots:
    """The state slots of a foreign model, by number; what a sequence keeps costs memory when it is there."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot() for _ in range(count)]

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The targets hold what the sources hold."""
        for source, target in zip(sources, targets, strict=True):
            self._slots[target] = self._slots[source].fork()

    def clear(self, numbers: Sequence[int]) -> None:
        """Forgets what these slots hold."""
        for number in numbers:
            self._slots[number].rewind(0)  # whoever has a place for it sees that it is free
            self._slots[number] = Slot()
