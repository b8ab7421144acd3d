"""An HTTP server for any model that Mnemos runs, with the protocols that clients already speak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.errors import needing_extra

if TYPE_CHECKING:
    from mnemos.serve.application import app

__all__ = ["app"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing_extra("the server needs it", "serve"):
        from mnemos.serve.application import app
    return app
