"""Page tables, without any request: growth, sharing, copies before writing, and freeing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemos.errors import CapacityError
from mnemos.memory.capacity import Capacity
from mnemos.memory.page_table import PageTable, PageTables
from tests.engine.toys import StateToy, ToyModel, Windows


def make_tables(pages: int = 8, window: Windows = 0, prefix_cache: bool = True) -> PageTables:
    model = ToyModel(page_size=4, window=window)
    model.reserve(pages)
    return PageTables(model, Capacity(model.cache.pages), prefix_cache)


def grown(tables: PageTables, rows: int) -> PageTable:
    table = tables.new()
    grow(tables, table, rows)
    return table


def grow(tables: PageTables, table: PageTable, rows: int) -> None:
    assert tables.make_room(table, rows)
    tables.extend(table, rows)
    table.done += rows


def test_a_table_grows_by_whole_pages() -> None:
    tables = make_tables()
    table = grown(tables, 5)
    assert tables.missing(table, 3) == ((0,), 0)
    assert tables.missing(table, 4) == ((1,), 0)
    assert tables.pools[0].used == 2
    assert list(table.groups[0].positions) == [0, 4]


def test_pages_are_added_where_a_table_lacks_them() -> None:
    tables = make_tables()
    table = tables.new()
    table.done = 12
    grow(tables, table, 5)
    table.done = 5
    assert tables.missing(table, 6) == ((2,), 0)
    tables.extend(table, 6)
    assert list(table.groups[0].positions) == [4, 8, 12, 16]
    assert list(table.groups[0].pages) == [2, 3, 0, 1]


def test_a_begun_page_that_is_shared_is_copied_before_it_is_written_to() -> None:
    tables = make_tables(prefix_cache=False)
    parent, fork = grown(tables, 6), tables.new()
    tables.share(parent, fork, 6)
    assert tables.missing(fork, 1) == ((1,), 0)
    grow(tables, fork, 1)
    assert parent.groups[0].pages[0] == fork.groups[0].pages[0]
    assert parent.groups[0].pages[1] != fork.groups[0].pages[1]
    assert tables.missing(parent, 1) == ((0,), 0)
    tables.release(fork)
    tables.release(parent)
    assert tables.pools[0].used == 0


def test_full_pages_of_another_table_are_reused() -> None:
    tables = make_tables()
    tokens = list(range(1, 12))
    first = grown(tables, 11)
    tables.remember(first, None, tokens)
    second = tables.new()
    assert tables.reuse(second, None, tokens) == 8
    assert second.groups[0].pages == first.groups[0].pages[:2]
    assert tables.reuse(tables.new(), "another salt", tokens) == 0
    assert tables.in_use(None, tokens) == (2,)


def test_room_is_made_by_forgetting_prefixes_that_nobody_uses() -> None:
    tables = make_tables(pages=3)
    first = grown(tables, 12)
    tables.remember(first, None, list(range(1, 13)))
    tables.release(first)
    assert tables.available == ((3,), 0)
    assert tables.make_room(tables.new(), 9)
    assert tables.pools[0].free == 3
    assert not tables.make_room(tables.new(), 13)
    with pytest.raises(CapacityError, match="needs 4 more cache pages of 4 tokens and 3 of 3 are free"):
        tables.refuse(tables.new(), 13)


def test_positions_whose_window_was_given_back_are_evaluated_again() -> None:
    tables = make_tables(window=5)
    table = grown(tables, 24)
    tables.leave_behind(table)
    # The window's reach, and one more as strategies may truncate a few tokens.
    assert list(table.groups[0].positions) == [16, 20]
    assert tables.pools[0].used == 2
    tables.trim(table, 22)
    assert table.done == 22
    tables.trim(table, 14)
    assert table.done == 0
    assert tables.pools[0].used == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_the_short_way_to_see_that_nothing_is_missing_agrees_with_the_plain_one(actions: list[tuple[int, int]]) -> None:
    """`holds_next` and `missing`: with pages alone and with states alone."""
    for stateful in (False, True):
        if stateful:
            model = StateToy()
            model.reserve_states(50)
            tables = PageTables(model, Capacity((0,), 50), True)
        else:
            tables = make_tables(pages=500, prefix_cache=False)
        known = [grown(tables, 1)]
        for action, number in actions:
            table = known[number % len(known)]
            if action == 0:
                grow(tables, table, number + 1)
            elif action == 1:
                known.append(tables.new())
                tables.share(table, known[-1], max(0, table.done - number))
            elif action == 2:
                tables.trim(table, number)
            elif len(known) > 1:
                tables.release(known.pop(number % len(known)))
            for one in known:
                begun = stateful or one.done % tables.page_size != 0  # a new page has no shortcut
                assert tables.holds_next(one) == (begun and tables.missing(one, 1) == ((0,), 0))


def test_each_layer_group_keeps_what_its_window_reaches() -> None:
    tables = make_tables(pages=30, window=(0, 5, 9))
    assert tables.windows == (0, 9, 5)
    table = grown(tables, 24)
    assert tables.missing(table, 9) == ((3, 3, 3), 0)
    tables.leave_behind(table)
    assert [own.positions[0] for own in table.groups] == [0, 12, 16]
    assert [pool.used for pool in tables.pools] == [6, 3, 2]
    fork = tables.new()
    tables.share(table, fork, 22)
    tables.trim(fork, 22)
    assert fork.done == 22
    assert tables.missing(fork, 1) == ((1, 1, 1), 0)
    tables.trim(fork, 19)
    assert fork.done == 0  # position 19 sees 15, which the shortest window has left
    assert all(not own.pages for own in fork.groups)


def test_a_text_that_slid_is_truncated_among_the_pages_that_it_kept() -> None:
    tables = make_tables(pages=30, window=(0, 5))
    table = grown(tables, 24)
    tables.leave_behind(table)
    tables.leave(table, 16)
    table.done = 12  # its first tokens are evaluated again before what it kept
    grow(tables, table, 4)
    table.done = 24
    assert [list(own.positions) for own in table.groups] == [[12, 16, 20]] * 2
    tables.leave_behind(table)
    tables.trim(table, 21)
    assert table.done == 21


def test_reused_pages_are_those_that_the_next_position_sees() -> None:
    tables = make_tables(pages=30, window=(0, 5))
    tokens = list(range(1, 25))
    first = grown(tables, 24)
    tables.remember(first, None, tokens, ended=True)
    tables.release(first)
    assert [pool.used for pool in tables.pools] == [6, 2]
    second = tables.new()
    assert tables.reuse(second, None, [*tokens, 1]) == 24
    assert [list(own.positions) for own in second.groups] == [[0, 4, 8, 12, 16, 20], [20]]
    assert tables.in_use(None, tokens) == (6, 1)
    assert tables.needs(100) == (25, 6 // 4 + 1 + 3)


def test_pages_found_beyond_those_of_a_table_leave_no_gap() -> None:
    tables = make_tables(pages=30, window=(0, 5))
    tokens = list(range(1, 25))
    first, second = grown(tables, 24), grown(tables, 4)
    tables.remember(first, None, tokens, ended=True)
    assert tables.reuse(second, None, [*tokens, 1]) == 20
    assert [list(own.positions) for own in second.groups] == [[0, 4, 8, 12, 16, 20], [20]]
