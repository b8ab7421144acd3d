"""Who holds which state slot: what a model keeps of a sequence beside its pages, or in their place."""

from __future__ import annotations

from mnemos.contract import StatefulModel

NO_STATE = -1  # of a sequence that has no slot (yet)


class StateSlots:
    """Slots 0 to total - 1 of a model's states, each free or held by a number of sequences.

    Forks hold their parent's slot together with it until one of them evaluates more tokens, which copies it; a parent
    that ends before leaves it to the fork without a copy. A slot that nobody holds any more is cleared.
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
        """True if there is a slot and only one sequence holds it: the model may write to it."""
        return slot != NO_STATE and self.references[slot] == 1

    def allocate(self) -> int:
        """A clear slot, held once. The caller has made sure that there is one."""
        slot = self._free.pop()
        self.references[slot] = 1
        return slot

    def share(self, slot: int) -> int:
        """Holds the slot once more; NO_STATE stays what it is."""
        if slot != NO_STATE:
            self.references[slot] += 1
        return slot

    def own(self, slot: int) -> int:
        """A slot that one sequence holds alone and that has this one's content: itself, a copy, or a clear one."""
        if self.is_own(slot):
            return slot
        new = self.allocate()
        if slot != NO_STATE:
            self.model.copy_states((slot,), (new,))
            self.references[slot] -= 1
        return new

    def release(self, slot: int) -> None:
        """Lets the slot go once."""
        if slot != NO_STATE:
            self.references[slot] -= 1
            if not self.references[slot]:
                self._free.append(slot)
                self.model.clear_states((slot,))
