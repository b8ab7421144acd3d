"""What the page asks for besides the protocols: the generation fields, and what the engines are doing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from mnemos.engine.statistics import Latency
from mnemos.serve.catalogue import Served
from mnemos.serve.generation_fields import generation_fields
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.streams import encode, event_stream

INTERVAL = 0.5  # seconds between two looks at the engines

router = APIRouter(tags=["server"])


@router.get("/generation-fields")
async def list_generation_fields() -> list[dict[str, Any]]:
    """Every field of a request that says how text is generated, with its limits, default and help."""
    return generation_fields()


@router.get("/engine/live", response_class=StreamingResponse)
async def engine_live(request: Request) -> StreamingResponse:
    """A stream of server-sent events, two a second: what each model's engine is doing."""
    server = server_of(request)
    looks = _looks(server.catalogue.models, lambda: request.app.state.guard.draining)
    return event_stream(looks, server.settings.ping, _failure)


def figures(model: Served) -> dict[str, Any]:
    """What a model's engine is doing: counts since it was loaded, latencies in seconds, None without a measurement."""
    shown: dict[str, Any] = {"id": model.name, "loaded": model.loaded}
    if not model.loaded:
        return shown
    now = model.engine.stats()
    return shown | {
        "running": now.running,
        "waiting": now.waiting,
        "pages_total": now.pages_total,
        "pages_used": now.pages_used - now.pages_cached,
        "pages_cached": now.pages_cached,
        "prefix_hit_rate": now.prefix_hit_rate,
        "tokens_per_second": now.tokens_per_second,
        "generated_tokens": now.generated_tokens,
        "prompt_tokens": now.prompt_tokens,
        "time_to_first_token": _latency(now.time_to_first_token),
        "inter_token_latency": _latency(now.inter_token_latency),
    }


def _latency(latency: Latency) -> dict[str, float | None]:
    values = {"median": latency.median, "p99": latency.p99}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


async def _looks(models: Iterable[Served], draining: Callable[[], bool]) -> AsyncIterator[str]:
    """Ends when the server stops, which would otherwise wait for a page that is only watching."""
    while not draining():
        yield f"data: {encode({'models': [figures(model) for model in models]})}\n\n"
        await asyncio.sleep(INTERVAL)


def _failure(refusal: Refusal) -> str:
    return f"data: {encode(refusal.body('/engine/live'))}\n\n"
