"""Replicas of the server on Ray: `ray.serve.run(mnemos.serve.ray.application("smollm2-135m", replicas=2))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.errors import MissingDependencyError

if TYPE_CHECKING:
    from mnemos.cluster.ray_serve import application

__all__ = ["application"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from mnemos.cluster.ray_serve import application
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mnemos"):
            raise
        raise MissingDependencyError(
            f"{error.name} is not installed; replicas on Ray need it: pip install 'mnemos[ray]'", name=error.name
        ) from error
    return application
