"""How many threads PyTorch would use, for what computes beside it while it is held to one."""

from __future__ import annotations

import threading

import torch


class _Held(threading.local):
    threads: int | None = None


_held = _Held()


def outer_threads() -> int:
    """PyTorch's threads of the calling thread, or those it had before `hold_threads`."""
    return _held.threads or torch.get_num_threads()


def hold_threads() -> bool:
    """PyTorch computes on the calling thread alone from now on; False if it does so already.

    Its other threads spin for work after each operation, and would only take the cores from the native core's.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return False
    _held.threads = threads
    torch.set_num_threads(1)
    return True


def release_threads() -> None:
    """Ends what a `hold_threads` that answered True began."""
    if _held.threads is not None:
        torch.set_num_threads(_held.threads)
        _held.threads = None
