"""A server that answers as a script says, with the page's own files in front: what the page is tested against."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mnemos.serve.generation_fields import generation_fields
from mnemos.serve.page_files import page_files, page_routes


@dataclass
class Script:
    """What the server does next. `seen` holds the bodies of the chat requests, the latest last.

    wait      seconds before the first token
    pace      seconds between tokens
    others    the alternatives to each token
    drop      the number of tokens after which the connection breaks, or None
    fail      the same for an error event in the stream
    key       the API key that is asked for; "" for none
    """

    reply: str = "The sky is blue because air scatters short waves most."
    reasoning: str = ""
    wait: float = 0.0
    pace: float = 0.0
    drop: int | None = None
    fail: int | None = None
    key: str = ""
    loaded: bool = True
    models: tuple[str, ...] = ("smollm2-135m", "qwen3-0.6b")
    finish: str = "stop"
    others: tuple[str, ...] = (" green", " red", " cold", " wide")
    seen: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    generated: int = 0
    cancelled: int = 0


def pieces(text: str) -> list[str]:
    """A text as tokens: words with the space before them, and signs."""
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


def token(text: str, index: int, others: tuple[str, ...]) -> dict[str, Any]:
    """A token whose probability depends on its place, with its alternatives; some have one that is more probable."""
    p = (0.98, 0.72, 0.41, 0.17, 0.05, 0.009)[(index * 5) % 6]
    rest = [max((1 - p) * share, 1e-9) for share in (0.5, 0.25, 0.12, 0.06)]
    alternatives = [(text, p), *zip(others, rest, strict=False)]
    listed = [_entry(name, q) for name, q in sorted(alternatives, key=lambda pair: -pair[1])]
    return {**_entry(text, p), "top_logprobs": listed}


def _entry(text: str, p: float) -> dict[str, Any]:
    return {"token": text, "logprob": math.log(p), "bytes": list(text.encode())}


def scripted_app(script: Script) -> Starlette:
    """The application that follows the script."""

    def allowed(request: Request) -> bool:
        return not script.key or request.headers.get("authorization") == f"Bearer {script.key}"

    def refusal(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": None}}, status)

    async def models(request: Request) -> Response:
        if not allowed(request):
            return refusal(401, "the API key is missing or wrong")
        data = [
            {"id": name, "object": "model", "created": 1, "owned_by": "mnemos", "context_length": 8192}
            for name in script.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def fields(request: Request) -> Response:
        return (
            JSONResponse(generation_fields()) if allowed(request) else refusal(401, "the API key is missing or wrong")
        )

    async def chat(request: Request) -> Response:
        if not allowed(request):
            return refusal(401, "the API key is missing or wrong")
        body = await request.json()
        script.seen.append(body)
        if body.get("temperature", 0) > 100:
            return refusal(400, f"temperature is {body['temperature']}; it must be a number from 0 to 100")
        return StreamingResponse(stream(body, script), media_type="text/event-stream")

    async def completions(request: Request) -> Response:
        body = await request.json()
        script.seen.append(body)
        script.running += len(body["prompt"])
        script.most_running = max(script.most_running, script.running)
        for _ in range(40):
            await asyncio.sleep(script.pace)
            script.generated += len(body["prompt"])
        script.running -= len(body["prompt"])
        return JSONResponse({"object": "text_completion", "choices": []})

    async def live(request: Request) -> Response:
        return StreamingResponse(live_events(script), media_type="text/event-stream")

    routes = [
        Route("/v1/models", models),
        Route("/generation-fields", fields),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/engine/live", live),
    ]
    return Starlette(routes=[*routes, *page_routes(page_files())])


async def stream(body: dict[str, Any], script: Script) -> AsyncIterator[str]:
    """The chunks of one reply. A continued message goes on where it ends, if the script's reply begins with it."""
    reply = script.reply.replace("{prompt}", body["messages"][-1]["content"])
    script.running += 1
    script.most_running = max(script.most_running, script.running)
    if body.get("continue_final_message"):
        begun = body["messages"][-1]["content"]
        reply = reply[len(begun) :] if reply.startswith(begun) else " and so on."
    complete = False
    try:
        await asyncio.sleep(script.wait)
        for text in pieces(script.reasoning):
            yield chunk({"reasoning_content": text})
            await asyncio.sleep(script.pace)
        for index, text in enumerate(pieces(reply)):
            if index == script.drop:
                raise ConnectionResetError
            if index == script.fail:
                yield f"data: {json.dumps({'error': {'message': 'the model failed', 'code': None}})}\n\n"
                yield "data: [DONE]\n\n"
                return
            own = [token(text, index, script.others)] if body.get("logprobs") else []
            yield chunk({"content": text}, logprobs={"content": own} if own else None)
            script.generated += 1
            await asyncio.sleep(script.pace)
        yield chunk({}, finish=script.finish)
        count = len(pieces(reply))
        usage = {"prompt_tokens": 40, "completion_tokens": count, "total_tokens": 40 + count}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
        complete = True
    finally:
        script.running -= 1
        script.cancelled += not complete


def chunk(delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None) -> str:
    """One event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


async def live_events(script: Script) -> AsyncIterator[str]:
    """Figures that follow from what the script's server does."""
    while True:
        model = {
            "id": script.models[0],
            "loaded": script.loaded,
            "running": script.running,
            "waiting": max(script.running - 6, 0),
            "pages_total": 512,
            "pages_used": 30 * script.running,
            "pages_cached": min(script.generated // 4, 300),
            "prefix_hit_rate": 0.62,
            "generated_tokens": script.generated,
            "prompt_tokens": 40 * len(script.seen),
            "time_to_first_token": {"median": 0.043, "p99": 0.121},
            "inter_token_latency": {"median": 0.0082, "p99": 0.0171},
        }
        yield f"data: {json.dumps({'models': [model]})}\n\n"
        await asyncio.sleep(0.5)


class ScriptedServer:
    """The application on a free port, in a thread of its own; its address is `url`."""

    def __init__(self, script: Script, port: int = 0) -> None:
        config = uvicorn.Config(scripted_app(script), port=port, log_level="critical", timeout_graceful_shutdown=0)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        return self

    def __exit__(self, *reason: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)
