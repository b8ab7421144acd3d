"""Large pages for memory that PyTorch allocates without asking for them: a step that reads all of it reads faster."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_LARGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; older ones refuse it

Region = tuple[int, int]  # addresses of the first byte and after the last one


@contextmanager
def in_large_pages() -> Iterator[None]:
    """Puts what is allocated inside the block, and is still there at its end, into large pages where the system can.

    That takes seconds for a gigabyte, so a thread does it afterwards, while the memory is used or even given back.
    """
    if sys.platform != "linux" or not _MAPS.exists():
        yield
        return
    before = _anonymous()
    yield
    threading.Thread(target=_collapse, args=(new_regions(before, _anonymous()),), daemon=True).start()


def _collapse(regions: list[Region]) -> None:
    madvise = ctypes.CDLL(None).madvise
    for begin, end in regions:
        for page in range(-(-begin // _LARGE) * _LARGE, end - _LARGE + 1, _LARGE):
            # Whatever it answers: the memory holds the same, in a large page or in small ones.
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(_LARGE), _MADV_COLLAPSE)


def new_regions(before: list[Region], after: list[Region]) -> list[Region]:
    """What is in `after` and not in `before`; both are in order and without overlaps."""
    found = []
    for begin, end in after:
        for low, high in before:
            if low < end and high > begin:
                if low > begin:
                    found.append((begin, low))
                begin = high
        if begin < end:
            found.append((begin, end))
    return found


def _anonymous() -> list[Region]:
    """The process's writable memory that belongs to no file."""
    regions = []
    for line in _MAPS.read_bytes().removesuffix(b"\n").split(b"\n"):  # a file's name may have any other bytes
        addresses, access, _, _, inode, *_ = line.split()
        if b"w" in access and inode == b"0" and b"[stack" not in line:
            low, high = addresses.split(b"-")
            regions.append((int(low, 16), int(high, 16)))
    return regions
