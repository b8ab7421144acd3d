"""`/api/chat` and `/api/generate`: whole or as JSON lines."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos.engine.answers import AnswerEvent, CallPiece, CallStart, End, Piece, arguments_value
from mnemos.engine.chat import Conversation, ToolChoice
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import Running, start
from mnemos.serve.ollama.types import (
    ChatRequest,
    GenerateRequest,
    GenerationRequest,
    fields_of,
    messages_of,
    names_of,
    seconds_of,
    thinking_of,
)
from mnemos.serve.openai.shapes import logprob_entries
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import State, server_of
from mnemos.serve.streams import encode, line_stream
from mnemos.serve.task import Infill, Task

router = APIRouter(tags=["Ollama"])
LENGTHS = ("length", "time")


@router.post("/api/chat")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation; without messages, loads the model or, with keep_alive 0, unloads it."""
    state, connection = server_of(request), connection_of(request)
    if not body.messages:
        return await _load(body, state, {"message": {"role": "assistant", "content": ""}})
    thinking, template = thinking_of(body.think)
    conversation = Conversation(
        messages_of(body.messages),
        body.tools or (),
        ToolChoice("auto" if body.tools else "none"),
        continues=body.messages[-1].get("role") == "assistant" and not body.messages[-1].get("tool_calls"),
        thinking=thinking,
        template=template,
    )
    return await _answer(body, state, connection, conversation, in_message=True)


@router.post("/api/generate")
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continues a prompt: as a conversation, unless it is raw or has a suffix."""
    state, connection = server_of(request), connection_of(request)
    if body.images:
        raise Refusal(400, "images: this server's models read text only", param="images")
    if not body.prompt:
        return await _load(body, state, {"response": ""})
    prompt: str | Conversation | Infill = body.prompt
    if body.suffix:
        prompt = Infill(body.prompt, body.suffix)
    elif not body.raw:
        thinking, template = thinking_of(body.think)
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        prompt = Conversation(messages, choice=ToolChoice("none"), thinking=thinking, template=template)
    return await _answer(body, state, connection, prompt, in_message=False)


async def _answer(
    body: GenerationRequest,
    state: State,
    connection: Connection,
    prompt: str | Conversation | Infill,
    *,
    in_message: bool,
) -> Response:
    if "template" in body.further or "context" in body.further:
        ignored = [name for name in ("template", "context") if name in body.further]
        connection.headers["x-mnemos-ignored"] = ", ".join(ignored)
    task = Task(prompt, fields_of(body), names={**names_of(), "prompt": "messages" if in_message else "prompt"})
    keep_alive = seconds_of(body.keep_alive)
    began = time.perf_counter()
    model = await state.hold(body.wanted, connection)
    if keep_alive is not None:
        model.keep_alive = keep_alive
    loaded = time.perf_counter() - began
    running = await start(model, task, connection)
    answer = Lines(running, in_message, body.wanted or model.name, connection.started, loaded)
    if body.stream is False:
        return JSONResponse(await answer.whole())
    return line_stream(answer.lines(), _failed)


async def _load(body: GenerationRequest, state: State, empty: dict[str, Any]) -> Response:
    keep_alive = seconds_of(body.keep_alive)
    model = state.catalogue.find(body.wanted)
    if keep_alive == 0:
        await state.catalogue.unload(model)
    else:
        await state.catalogue.load(body.wanted)
        if keep_alive is not None:
            model.keep_alive = keep_alive
    reason = "unload" if keep_alive == 0 else "load"
    head = {"model": body.wanted or model.name, "created_at": now()}
    return JSONResponse({**head, **empty, "done": True, "done_reason": reason})


class Lines:
    """Writes an answer as Ollama's objects.

    in_message: pieces are messages, as in a chat; otherwise the text is the field `response`.
    name: what the request called the model. began: when the request came, on the clock time.perf_counter.
    loaded: seconds for which the model was loaded.
    """

    def __init__(self, running: Running, in_message: bool, name: str, began: float, loaded: float) -> None:
        self.running = running
        self._in_message = in_message
        self._name = name
        self._began = began
        self._loaded = loaded
        self._call: list[str] | None = None  # the name and the arguments of the call that is arriving

    async def whole(self) -> dict[str, Any]:
        """One object with everything."""
        (result,) = (await self.running.results())[:1]
        calls = [_call(call.name, call.arguments) for call in result.calls]
        shown = self._shown(result.text, result.reasoning, calls)
        return {**self._head(), **shown, **self._logprobs(result.tokens), **self._last(result.end)}

    async def lines(self) -> AsyncIterator[str]:
        """An object a step, and a last one with the numbers."""
        end = End(0, "stop")
        async for events in self.running.events():
            end = next((event for event in events if isinstance(event, End)), end)
            pieces = [shown for event in events for shown in self._pieces(event)]
            if pieces:
                yield "".join(encode({**self._head(), **shown, "done": False}) + "\n" for shown in pieces)
        yield encode({**self._head(), **self._shown("", "", []), **self._last(end)}) + "\n"

    def _pieces(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """What an event of the first result shows; a call is shown once it is complete."""
        if event.sequence:
            return []
        finished = self._finished_call() if isinstance(event, (CallStart, End)) else []
        match event:
            case Piece(_, text, tokens, kind):
                if not text and not self._logprobs(tokens):
                    return []
                shown = self._shown(text if kind == "text" else "", text if kind == "reasoning" else "", [])
                return [{**shown, **self._logprobs(tokens)}]
            case CallStart(_, _, _, name):
                self._call = [name]
            case CallPiece(_, _, text):
                assert self._call is not None
                self._call.append(text)
        return finished

    def _finished_call(self) -> list[dict[str, Any]]:
        call, self._call = self._call, None
        return [] if call is None else [self._shown("", "", [_call(call[0], "".join(call[1:]))])]

    def _shown(self, text: str, reasoning: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        further = {**({"thinking": reasoning} if reasoning else {}), **({"tool_calls": calls} if calls else {})}
        if self._in_message:
            return {"message": {"role": "assistant", "content": text, **further}}
        return {"response": text, **further}

    def _logprobs(self, tokens: Any) -> dict[str, Any]:
        tokenizer, top = self.running.model.engine.tokenizer, self.running.config.logprobs
        if top is None or tokenizer is None:
            return {}
        entries = logprob_entries(tokens, tokenizer, top)
        return {"logprobs": entries} if entries else {}

    def _head(self) -> dict[str, Any]:
        return {"model": self._name, "created_at": now()}

    def _last(self, end: End) -> dict[str, Any]:
        usage, timings = self.running.usage, self.running.handle.timings
        times = timings.tokens
        first = times[0] - timings.started if times and not math.isnan(timings.started) else 0.0
        return {
            "done": True,
            "done_reason": "length" if end.reason in LENGTHS else "stop",
            "total_duration": _nanoseconds(time.perf_counter() - self._began),
            "load_duration": _nanoseconds(self._loaded),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(times[-1] - times[0] if times else 0.0),
        }


def now() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments_value(arguments)}}


def _nanoseconds(seconds: float) -> int:
    return max(round(seconds * 1e9), 1)


def _failed(refusal: Refusal) -> str:
    return encode(refusal.body("/api/")) + "\n"
