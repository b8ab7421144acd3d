"""`/v1/embeddings`: the language model's last hidden states, pooled and of length 1."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from mnemos.contract import Floats
from mnemos.serve.connection import connection_of
from mnemos.serve.embedding import embeddings
from mnemos.serve.generation import extra_fields
from mnemos.serve.openai.completions import prompts_of
from mnemos.serve.openai.types import EmbeddingRequest, refuse_impossible
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.task import Task

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/embeddings")
async def embed(body: EmbeddingRequest, request: Request) -> JSONResponse:
    """Embeddings of texts or token ids."""
    state, connection = server_of(request), connection_of(request)
    extra_fields(refuse_impossible(body), tuple(EmbeddingRequest.model_fields), connection)
    tasks = [Task(one, names={"prompt": "input"}, keep=body.truncate_prompt_tokens)
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


def _shown(vector: Floats, form: str | None) -> Any:
    """A list of numbers, or base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.asarray(vector, np.float64).tolist()
