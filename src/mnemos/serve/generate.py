"""`POST /generate`: a text in, a text out, for programs that want nothing else."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from mnemos.serve.body import Body
from mnemos.serve.connection import connection_of
from mnemos.serve.generation import extra_fields, start
from mnemos.serve.state import server_of
from mnemos.serve.task import Task

router = APIRouter(tags=["server"])


class GenerateRequest(Body):
    """A text to continue, and any field of GenerationConfig."""

    text: str
    model: str | None = None
    max_length: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> dict[str, Any]:
    """Continues a text. `max_length` counts the prompt's tokens too, `max_tokens` the new ones only."""
    state, connection = server_of(request), connection_of(request)
    fields = extra_fields(body.further, tuple(GenerateRequest.model_fields), connection)
    fields |= body.given("max_length", "max_tokens", "temperature")
    model = await state.hold(body.model, connection)
    running = await start(model, Task(body.text, fields, names={"prompt": "text"}), connection)
    results = await running.results()
    return {"generated_text": results[0].text, "finish_reason": results[0].end.reason}
