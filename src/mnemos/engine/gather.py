"""Many requests at once, of one caller who waits for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import SimpleQueue

from mnemos.engine.completion import Completion
from mnemos.engine.handle import RequestHandle
from mnemos.errors import CapacityError

Launch = Callable[[], RequestHandle]


def run_all(launches: Sequence[Launch], in_flight: int, on_done: Callable[[], None] = lambda: None) -> list[Completion]:
    """Launches requests, at most `in_flight` at once, and returns their completions in order.

    Where the engine's queue is full, waits for one of its own. The first error, or an interrupt, cancels all.
    """
    handles: list[RequestHandle] = []
    ended: SimpleQueue[None] = SimpleQueue()
    running = 0

    def wait_for_one() -> int:
        ended.get()
        on_done()
        return running - 1

    try:
        for launch in launches:
            while running >= in_flight:
                running = wait_for_one()
            while (handle := _try(launch, may_refuse=running > 0)) is None:
                running = wait_for_one()
            handle.add_done_callback(lambda: ended.put(None))
            handles.append(handle)
            running += 1
        while running:
            running = wait_for_one()
        return [handle.result() for handle in handles]
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise


def _try(launch: Launch, may_refuse: bool) -> RequestHandle | None:
    try:
        return launch()
    except CapacityError:
        if not may_refuse:
            raise
        return None
