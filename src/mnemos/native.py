"""The only entry to the C++ core: `core` is the module, or None if it was not built."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from mnemos.errors import MissingDependencyError

__all__ = ["core", "problem", "require_core"]
problem: ImportError | None = None
if TYPE_CHECKING:
    import mnemos._native as core
else:
    try:
        core = import_module("mnemos._native")
    except ImportError as error:  # not built, or built for another Python or machine
        core, problem = None, error


def require_core() -> ModuleType:
    """The module; MissingDependencyError if it cannot be loaded."""
    if core is None:
        raise MissingDependencyError(
            f"the native core cannot be loaded ({problem}); reinstall mnemos, or use backend='numpy'"
        ) from problem
    return core
