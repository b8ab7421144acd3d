"""Reference counts for state slots: what a model keeps per sequence besides pages, or instead of them."""

from __future__ import annotations

from mnemos.contract import StatefulModel

NO_STATE = -1  # for a sequence without a slot (yet)


class StateSlots:
    """Slots 0 to total - 1 of a model's states, each free or held by one or more sequences.

    Forks share their parent's slot until one of them evaluates more tokens, which copies it; a parent that ends before
    that leaves it to the fork without a copy. A slot without holders is cleared.
    """

    def __init__(self, model: StatefulModel, total: int) -> None:
        self.model = model
        self.total = total
        self.references = [0] * total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def is_own(self, slot: int) -> bool:
        """True if the slot exists and only one sequence holds it, so that the model may write to it."""
        return slot != NO_STATE and self.references[slot] == 1

    def allocate(self) -> int:
        """A clear slot, held once. The caller must have made sure that there is one."""
        slot = self._free.pop()
        self.references[slot] = 1
        return slot

    def share(self, slot: int) -> int:
        """Holds the slot once more; NO_STATE is returned unchanged."""
        if slot != NO_STATE:
            self.references[slot] += 1
        return slot

    def own(self, slot: int) -> int:
        """A slot with this one's content that only the caller holds: itself, a copy, or a clear one."""
        if self.is_own(slot):
            return slot
        new = self.allocate()
        if slot != NO_STATE:
            self.model.copy_states((slot,), (new,))
            self.references[slot] -= 1
        return new

    def release(self, slot: int) -> None:
        """Drops one hold on the slot."""
        if slot != NO_STATE:
            self.references[slot] -= 1
            if not self.references[slot]:
                self._free.append(slot)
                self.model.clear_states((slot,))
