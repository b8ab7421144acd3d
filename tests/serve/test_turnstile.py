"""The turnstile: so many a turn, in order, and others in between."""

from __future__ import annotations

import asyncio

from mnemos.serve.turnstile import Turnstile


def test_a_few_pass_in_a_turn_in_their_order() -> None:
    async def crowd() -> list[list[int]]:
        turnstile, turns = Turnstile(3), [[]]  # type: tuple[Turnstile, list[list[int]]]

        async def caller(number: int) -> None:
            await turnstile()
            turns[-1].append(number)

        callers = [asyncio.ensure_future(caller(number)) for number in range(10)]
        while not all(one.done() for one in callers):
            await asyncio.sleep(0)
            turns.append([])
        return [turn for turn in turns if turn]

    turns = asyncio.run(crowd())
    assert [number for turn in turns for number in turn] == list(range(10))
    assert max(map(len, turns)) == 3


def test_who_comes_alone_does_not_wait() -> None:
    async def alone() -> int:
        turnstile, turns = Turnstile(1), 0
        for _ in range(3):
            passing = turnstile()
            try:
                passing.send(None)
            except StopIteration:
                turns += 1
            await asyncio.sleep(0.001)
        return turns

    assert asyncio.run(alone()) == 3


def test_who_gives_up_takes_nobodys_place() -> None:
    async def crowd() -> list[str]:
        turnstile, passed = Turnstile(1), list[str]()

        async def caller(name: str) -> None:
            await turnstile()
            passed.append(name)

        first, second, third = (asyncio.ensure_future(caller(name)) for name in "abc")
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([first, second, third], timeout=5)
        return passed

    assert asyncio.run(crowd()) == ["a", "c"]
