"""Work that is done while an engine has nothing else to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from mnemos.errors import MnemosError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine


class IdleRefresh:
    """Calls `work` in a thread of its own, again and again while it does something, once an engine has been idle.

    work   returns how much it has done; it is called again after the next pause if that is nothing
    after  for how many seconds the engine must have had no requests

    The thread ends with `close`, or with the engine.
    """

    def __init__(self, engine: InferenceEngine, work: Callable[[], int], after: float) -> None:
        self._engine = engine
        self._work = work
        self._after = after
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mnemos-refresh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after the piece of work that it is at."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        seen = -1
        while not self._closed.wait(self._after):
            try:
                stats = self._engine.stats()
                idle = stats.submitted == seen and not stats.running and not stats.waiting
                seen = stats.submitted
                while idle and not self._closed.is_set() and self._work():
                    now = self._engine.stats()
                    idle = not now.running and not now.waiting
                    seen = now.submitted
            except (MnemosError, ReferenceError):  # the engine was closed, or has gone
                return
