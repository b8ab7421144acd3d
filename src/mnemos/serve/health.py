"""Whether the server lives, whether it can answer, and what it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from mnemos.serve.state import server_of
from mnemos.version import __version__

router = APIRouter(tags=["server"])


@router.get("/health")
@router.get("/health/", include_in_schema=False)
async def health() -> dict[str, str]:
    """The process lives and its event loop answers. Needs no key."""
    return {"status": "healthy"}


@router.get("/ready")
async def ready(request: Request, response: Response) -> dict[str, Any]:
    """Whether the default model is loaded: 503 until then."""
    catalogue = server_of(request).catalogue
    wanted = [catalogue.default] if catalogue.default else catalogue.models
    missing = [model.name for model in wanted if not model.loaded]
    if missing:
        response.status_code = 503
        return {"status": "loading", "missing": missing}
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of Mnemos."""
    return {"version": __version__}
