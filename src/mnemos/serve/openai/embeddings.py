"""`/v1/embeddings`: the language model's last hidden states, pooled and of length 1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from mnemos.contract import Floats
from mnemos.engine.embedding import EmbeddingHandle
from mnemos.errors import MnemosError
from mnemos.serve.catalogue import Served
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import exchange_of, extra_fields, salted
from mnemos.serve.openai.completions import prompts_of
from mnemos.serve.openai.types import EmbeddingRequest, refuse_impossible
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.state import server_of
from mnemos.serve.task import Task

router = APIRouter(tags=["OpenAI"])
NAMES = {"prompt": "input"}


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, request: Request) -> JSONResponse:
    """Embeddings of texts or token ids."""
    state, connection = server_of(request), connection_of(request)
    extra_fields(refuse_impossible(body.further), tuple(EmbeddingRequest.model_fields), connection)
    tasks = [Task(one, names=NAMES, keep=body.truncate_prompt_tokens)
             for one in prompts_of(body.input, state.settings.max_prompts, "input")]  # fmt: skip
    async with state.catalogue.use(body.model) as model:
        size = model.engine.spec.hidden_size
        if body.dimensions not in (None, size):
            raise Refusal(
                400, f"dimensions is {body.dimensions}; {model.name} has embeddings of {size}: leave it out",
                param="dimensions",
            )  # fmt: skip
        vectors, used = await embeddings(model, tasks, connection, body.pooling or "mean")
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


async def embeddings(
    model: Served, tasks: Sequence[Task], connection: Connection, pooling: str = "mean"
) -> tuple[list[Floats], int]:
    """The embeddings of prompts, float32 (hidden size,), and the number of their tokens.

    They are computed together, and cancelled when the client goes away. Refusal for what cannot be embedded.
    """
    try:
        handles = await asyncio.to_thread(_submit, model, tasks, connection, pooling)
        for handle in handles:
            connection.on_leave(handle.cancel)
        connection.notes["model"] = model.name
        return [await handle for handle in handles], sum(handle.prompt_tokens for handle in handles)
    except MnemosError as error:
        raise refusal_of(error, NAMES) from error


def _submit(model: Served, tasks: Sequence[Task], connection: Connection, pooling: str) -> list[EmbeddingHandle]:
    caller = connection.caller
    prompts = [exchange_of(model, task).prompt_ids for task in tasks]
    salt = salted(caller, None)
    return [model.engine.submit_embedding(one, pooling, tenant=caller.tenant, cache_salt=salt) for one in prompts]


def _shown(vector: Floats, form: str | None) -> Any:
    """A list of numbers, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.asarray(vector, np.float64).tolist()
