"""What is offered and loaded, in Ollama's words, and embeddings."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from fastapi import APIRouter, Request

from mnemos.serve.catalogue import FOREVER, Served
from mnemos.serve.connection import connection_of
from mnemos.serve.embedding import embeddings
from mnemos.serve.generation import template_source
from mnemos.serve.ollama.types import EmbedRequest, NamedRequest, seconds_of
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.task import Task
from mnemos.text.infill import infill_ids
from mnemos.text.tools.families import thinking_of

router = APIRouter(tags=["Ollama"])
VERSION = "0.12.6"  # of Ollama's API, as far as it is followed here; its clients refuse older ones


@router.get("/api/version")
@router.head("/api/version", include_in_schema=False)
async def version() -> dict[str, str]:
    """The version of the API."""
    return {"version": VERSION}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """All models on offer."""
    return {"models": [_listed(model) for model in server_of(request).catalogue.models]}


@router.get("/api/ps")
async def running(request: Request) -> dict[str, Any]:
    """The models that are loaded."""
    return {"models": [_loaded(model) for model in server_of(request).catalogue.models if model.loaded]}


@router.post("/api/show")
async def show(body: NamedRequest, request: Request) -> dict[str, Any]:
    """One model: what it can do, its context and its template. Loads it."""
    connection = connection_of(request)
    model = await server_of(request).hold(body.wanted, connection)
    return await asyncio.to_thread(_described, model)


@router.post("/api/embed")
async def embed(body: EmbedRequest, request: Request) -> dict[str, Any]:
    """Embeddings of one or several texts."""
    began = time.perf_counter()
    if body.input is None or body.input == []:
        raise Refusal(400, "input is missing; it must be a text or a list of texts", param="input")
    texts = [body.input] if isinstance(body.input, str) else body.input
    name, vectors, tokens = await _embeddings(body, texts, request)
    spent = round((time.perf_counter() - began) * 1e9)
    return {
        "model": name,
        "embeddings": vectors,
        "total_duration": spent,
        "load_duration": 1,
        "prompt_eval_count": tokens,
    }


@router.post("/api/embeddings")
async def embed_one(body: EmbedRequest, request: Request) -> dict[str, Any]:
    """An embedding, as older clients ask for it."""
    if not body.prompt:
        raise Refusal(400, "prompt is missing; it must be a text", param="prompt")
    _, vectors, _ = await _embeddings(body, [body.prompt], request)
    return {"embedding": vectors[0]}


@router.post("/api/pull")
@router.post("/api/push")
@router.post("/api/create")
@router.post("/api/copy")
@router.delete("/api/delete")
async def refused() -> None:
    """Models are chosen by whoever starts the server."""
    raise Refusal(403, "models are chosen when the server starts; a request cannot add, change or remove one")


async def _embeddings(body: EmbedRequest, texts: list[str], request: Request) -> tuple[str, list[list[float]], int]:
    if body.dimensions is not None:
        raise Refusal(
            400, "dimensions is set; the embeddings have the model's own size: leave it out", param="dimensions"
        )
    state, connection = server_of(request), connection_of(request)
    if len(texts) > state.settings.max_prompts:
        raise Refusal(
            400, f"input has {len(texts)} texts; it must be at most {state.settings.max_prompts}", param="input"
        )
    model = await state.hold(body.wanted, connection)
    keep_alive = seconds_of(body.keep_alive)
    if keep_alive is not None:
        model.keep_alive = keep_alive
    tasks = [Task(text, names={"prompt": "input"}) for text in texts]
    vectors, tokens = await embeddings(model, tasks, connection)
    return model.name, [vector.tolist() for vector in vectors], tokens


def _details(model: Served) -> dict[str, Any]:
    architecture = model.engine.spec.architecture if model.loaded else ""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": architecture,
        "families": [architecture] if architecture else [],
        "parameter_size": "",
        "quantization_level": "",
    }


def _listed(model: Served) -> dict[str, Any]:
    return {
        "name": f"{model.name}:latest",
        "model": f"{model.name}:latest",
        "modified_at": datetime.fromtimestamp(model.created, timezone.utc).isoformat(),
        "size": 0,
        "digest": hashlib.sha256(model.name.encode()).hexdigest(),
        "details": _details(model),
    }


def _loaded(model: Served) -> dict[str, Any]:
    until = datetime.now(timezone.utc) + timedelta(days=36500 if model.keep_alive == FOREVER else 0)
    if model.keep_alive != FOREVER:
        until += timedelta(seconds=max(model.keep_alive - (time.monotonic() - model.last_used), 0.0))
    length = model.engine.spec.context_length
    return {**_listed(model), "expires_at": until.isoformat(), "size_vram": 0, "context_length": length}


def _described(model: Served) -> dict[str, Any]:
    spec, tokenizer = model.engine.spec, model.engine.tokenizer
    template, capabilities = "", ["completion"]
    if tokenizer is not None:
        template = template_source(tokenizer)
        capabilities += ["tools"] if template else []
        capabilities += ["insert"] if infill_ids(tokenizer, "a", "b") is not None else []
        capabilities += ["thinking"] if thinking_of(template) is not None else []
    name = spec.architecture
    info: dict[str, Any] = {
        "general.architecture": name,
        "general.basename": str(spec.details.get("name") or model.name),
        f"{name}.context_length": spec.context_length,
        f"{name}.vocab_size": spec.vocabulary_size,
    }
    return {
        "modelfile": "",
        "parameters": f"num_ctx {spec.context_length}",
        "template": template,
        "details": _details(model),
        "model_info": info,
        "capabilities": capabilities,
        "modified_at": _listed(model)["modified_at"],
        "license": str(spec.details.get("license") or ""),
    }
