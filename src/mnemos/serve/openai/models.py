"""`/v1/models`: what is offered, with the context length under each name that clients look for.

The list and its items have the fields of OpenAI's and of Anthropic's, whose clients both ask here.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request

from mnemos.serve.catalogue import Adapted, Served
from mnemos.serve.state import server_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models on offer, and their adapters, each with its model as `parent`."""
    catalogue = server_of(request).catalogue
    models = [_described(model) for model in (*catalogue.models, *catalogue.adapted)]
    return {
        "object": "list",
        "data": models,
        "has_more": False,
        "first_id": models[0]["id"],
        "last_id": models[-1]["id"],
    }


@router.get("/v1/models/{name}")
async def show_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    return _described(server_of(request).catalogue.find(name))


def _described(model: Served) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "mnemos",
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created, timezone.utc).isoformat().replace("+00:00", "Z"),
    }
    if isinstance(model, Adapted):
        shown["parent"] = model.base.name
    if model.loaded:
        length = model.engine.spec.context_length
        shown |= {"context_length": length, "max_model_len": length, "meta": {"n_ctx": length}}
    return shown
