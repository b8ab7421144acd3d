"""An HTTP server for any model that Mnemos runs, with the protocols that clients already speak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.errors import MissingDependencyError

if TYPE_CHECKING:
    from mnemos.serve.application import app

__all__ = ["app"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from mnemos.serve.application import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mnemos"):
            raise
        raise MissingDependencyError(
            f"{error.name} is not installed; the server needs it: pip install 'mnemos[serve]'", name=error.name
        ) from error
    return app
