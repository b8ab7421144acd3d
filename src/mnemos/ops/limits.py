"""The limit of this process's address space, as `ulimit -v` sets it."""

from __future__ import annotations

from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

_SIZES = Path("/proc/self/statm")


def address_space() -> int:
    """Bytes that the process may map altogether, 0 without a limit."""
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
