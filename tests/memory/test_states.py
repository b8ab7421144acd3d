"""State slots: forks share one until a write, and no sequence finds another's leftovers."""

from __future__ import annotations

from collections.abc import Sequence

from mnemos.memory.states import NO_STATE, StateSlots


class Store:
    """What each slot holds."""

    def __init__(self, slots: int) -> None:
        self.content = ["" for _ in range(slots)]

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            assert not self.content[target]
            self.content[target] = self.content[source]

    def clear_states(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.content[slot] = ""


def make_slots(total: int) -> tuple[Store, StateSlots]:
    store = Store(total)
    return store, StateSlots(store, total)  # type: ignore[arg-type]


def test_a_new_sequence_gets_a_clear_slot_low_ones_first() -> None:
    _, slots = make_slots(3)
    assert [slots.own(NO_STATE), slots.own(NO_STATE)] == [0, 1]
    assert (slots.used, slots.free) == (2, 1)


def test_whoever_writes_first_to_a_shared_slot_gets_a_copy() -> None:
    store, slots = make_slots(3)
    parent = slots.own(NO_STATE)
    store.content[parent] = "text"
    fork = slots.share(parent)
    assert not slots.is_own(parent)
    assert slots.used == 1
    moved = slots.own(parent)
    assert store.content == ["text", "text", ""]
    assert moved == 1
    assert slots.own(fork) == fork == 0
    assert slots.own(moved) == moved


def test_a_parent_that_ends_leaves_its_slot_to_the_fork() -> None:
    store, slots = make_slots(1)
    parent = slots.own(NO_STATE)
    store.content[parent] = "text"
    fork = slots.share(parent)
    slots.release(parent)
    assert slots.own(fork) == fork
    assert store.content == ["text"]


def test_a_slot_that_nobody_holds_is_clear_and_free() -> None:
    store, slots = make_slots(2)
    slot = slots.own(NO_STATE)
    store.content[slot] = "secret"
    slots.release(slot)
    assert store.content == ["", ""]
    assert slots.free == slots.total
    slots.release(NO_STATE)
    assert slots.share(NO_STATE) == NO_STATE
    assert slots.free == slots.total
