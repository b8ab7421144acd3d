"""Replicas of the server on Ray: `ray.serve.run(mnemos.serve.ray.application("smollm2-135m", replicas=2))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.errors import needing_extra

if TYPE_CHECKING:
    from mnemos.cluster.ray_serve import application

__all__ = ["application"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing_extra("replicas on Ray need it", "ray"):
        from mnemos.cluster.ray_serve import application
    return application
