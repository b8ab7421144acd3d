"""`/v1/models`: what is offered, with the context length under each name that clients look for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from mnemos.serve.catalogue import Served
from mnemos.serve.state import server_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models on offer."""
    return {"object": "list", "data": [_described(model) for model in server_of(request).catalogue.models]}


@router.get("/v1/models/{name}")
async def show_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    return _described(server_of(request).catalogue.find(name))


def _described(model: Served) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "mnemos"}
    if model.loaded:
        length = model.engine.spec.context_length
        shown |= {"context_length": length, "max_model_len": length, "meta": {"n_ctx": length}}
    return shown
