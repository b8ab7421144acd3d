"""Memory that this process may use: the machine's, its cgroup's and its own limits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mnemos.errors import CapacityError
from mnemos.native import require_core

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def address_space() -> int:
    """Bytes that the process may map in total, 0 without a limit."""
    if resource is None:
        return 0
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def address_space_left() -> int | None:
    """Bytes that the process may still map; None without a limit, or where the system does not say what is mapped."""
    limit = address_space()
    if not limit or resource is None or not _SIZES.exists():
        return None
    return max(limit - int(_SIZES.read_text().split()[0]) * resource.getpagesize(), 0)


def machine_memory() -> int:
    """Bytes of memory that this process may use, of the machine's, its cgroup's and its own limit; 0 if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    limits = [total, address_space()]
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = ""
    if limit.isdigit():
        limits.append(int(limit))
    return min(filter(None, limits))


def resident_memory() -> int:
    """Bytes of memory that the process takes now, mapped files included; where unknown, the most that it took, or 0."""
    if resource is None:
        return 0
    try:
        return int(_SIZES.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes that the process could still take, of what the system and its cgroup have left; 0 if unknown."""
    return max(int(require_core().available_memory()), 0)


def check_memory(needed: int, purpose: str) -> None:
    """Raises CapacityError, with what is missing, if machine, cgroup or `ulimit -v` do not give `needed` bytes."""
    available, left = require_core().available_memory(), address_space_left()
    if left is not None:
        available = min(available, left) if available >= 0 else left
    if 0 <= available < needed:
        missing = (needed - available) / 1e6
        raise CapacityError(
            f"{purpose} needs {needed / 1e6:.0f} MB of memory and {available / 1e6:.0f} MB are available: "
            f"{missing:.0f} MB are missing"
        )
