"""Readers in an event loop are all woken, and by one call for all that were noted."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from mnemos.engine.handle import Channel
from mnemos.engine.wakeups import LoopReader


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_step_wakes_the_loop_once_for_all_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> tuple[int, int]:
        calls = []
        loop = asyncio.get_running_loop()
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *arguments: Any) -> asyncio.Handle:
            calls.append(callback)
            return call_soon_threadsafe(callback, *arguments)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        channels, readers = [Channel() for _ in range(8)], [LoopReader() for _ in range(8)]

        def step() -> None:
            for channel in channels:
                channel.deliver([], [])
            for channel in channels:
                channel.ring()

        for turn in range(2):
            with_readers = [channel.reading(reader) for channel, reader in zip(channels, readers, strict=True)]
            for context in with_readers:
                context.__enter__()
            in_thread(step)
            await asyncio.wait_for(asyncio.gather(*(reader.wait() for reader in readers)), 5)
            for context, reader in zip(with_readers, readers, strict=True):
                context.__exit__(None, None, None)
                reader.clear()
            assert len(calls) == turn + 1
        return len(calls), sum(len(channel.items) for channel in channels)

    assert asyncio.run(read()) == (2, 16)


def test_the_end_wakes_a_reader_without_a_ring() -> None:
    async def read() -> bool:
        channel, reader = Channel(), LoopReader()
        with channel.reading(reader):
            in_thread(lambda: channel.end(None))
            await asyncio.wait_for(reader.wait(), 5)
            return True

    assert asyncio.run(read())


def test_what_comes_between_a_look_and_the_wait_is_not_missed() -> None:
    async def read() -> bool:
        reader = LoopReader()
        reader.clear()
        in_thread(lambda: (reader.note(), reader.ring()))  # type: ignore[func-returns-value]
        await asyncio.sleep(0.01)  # the loop turns, and nobody waits yet
        await asyncio.wait_for(reader.wait(), 5)
        return True

    assert asyncio.run(read())


def test_a_closed_loop_is_no_reader_and_is_not_kept() -> None:
    async def leave() -> LoopReader:
        return LoopReader()

    loop = asyncio.new_event_loop()
    reader = loop.run_until_complete(leave())
    loop.close()
    reader.note()
    reader.ring()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None
    reader.ring()
