"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos.engine.answers import AnswerEvent, CallPiece, CallStart, End, Piece, arguments_value
from mnemos.engine.completion import Usage
from mnemos.errors import MnemosError
from mnemos.serve.anthropic.types import ACCEPTED, MessagesRequest, conversation_of, schema_of
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import Running, exchange_of, extra_fields, ignore, start
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.state import server_of
from mnemos.serve.streams import encode, event_stream
from mnemos.serve.task import Task

router = APIRouter(tags=["Anthropic"])
PATH = "/v1/messages"
PING = 'event: ping\ndata: {"type":"ping"}\n\n'
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "time": "max_tokens"}


@router.post(PATH)
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answers a conversation."""
    state, connection = server_of(request), connection_of(request)
    connection.headers["request-id"] = connection.id
    if body.max_tokens is None:
        raise Refusal(400, "max_tokens is missing; it must be a whole number of at least 1", param="max_tokens")
    task = _task(body, connection)
    model = await state.hold(body.model, connection)
    running = await start(model, task, connection)
    answer = MessageAnswer(running)
    if body.stream:
        return event_stream(answer.events(), state.settings.ping, failed, PING)
    return JSONResponse(await answer.whole())


@router.post(f"{PATH}/count_tokens")
async def count_tokens(body: MessagesRequest, request: Request) -> dict[str, int]:
    """The number of tokens of a conversation as the model would read it."""
    state, connection = server_of(request), connection_of(request)
    connection.headers["request-id"] = connection.id
    task = _task(body, connection)
    model = await state.hold(body.model, connection)
    try:
        exchange = await model.in_thread(exchange_of, model, task)
    except MnemosError as error:
        raise refusal_of(error) from error
    return {"input_tokens": len(exchange.prompt_ids)}


def _task(body: MessagesRequest, connection: Connection) -> Task:
    more = {name: value for name, value in body.further.items() if name not in ACCEPTED}
    fields = extra_fields(more, tuple(MessagesRequest.model_fields), connection)
    fields |= body.given("temperature", "top_p", "top_k")
    if body.max_tokens is not None:
        fields["max_new_tokens"] = body.max_tokens
    if body.stop_sequences:
        fields["stop"] = body.stop_sequences
    schema, name = schema_of(body)
    if schema is not None:
        fields["json_schema"] = schema
    names = {
        "max_new_tokens": "max_tokens",
        "stop": "stop_sequences",
        "prompt": "messages",
        "json_schema": name,
    }
    conversation, skipped = conversation_of(body)
    ignore(connection, skipped)
    return Task(conversation, fields, names=names)


class MessageAnswer:
    """Writes an answer as Anthropic's message: blocks of text, thinking and tool use."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.id = f"msg_{secrets.token_hex(12)}"

    async def whole(self) -> dict[str, Any]:
        """`message`."""
        (result,) = (await self.running.results())[:1]
        blocks: list[dict[str, Any]] = []
        if result.reasoning:
            blocks.append({"type": "thinking", "thinking": result.reasoning, "signature": ""})
        if result.text or not (result.calls or blocks):
            blocks.append({"type": "text", "text": result.text})
        for call in result.calls:
            blocks.append(
                {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_value(call.arguments)}
            )
        return {**self._head(blocks), **self._ending(result.end), "usage": usage_object(self.running.usage)}

    async def events(self) -> AsyncIterator[str]:
        """The events of a streamed message."""
        usage = {**usage_object(self.running.usage), "output_tokens": 0}
        yield _event(
            "message_start", message={**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        )
        blocks = Blocks()
        end = End(0, "stop")
        async for arrived in self.running.events():
            end = next((event for event in arrived if isinstance(event, End)), end)
            if written := "".join(chunk for event in arrived for chunk in blocks.chunks(event)):
                yield written
        yield "".join(blocks.close())
        yield _event("message_delta", delta=self._ending(end), usage=usage_object(self.running.usage))
        yield _event("message_stop")

    def _head(self, blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        model = self.running.model.name
        return {"id": self.id, "type": "message", "role": "assistant", "model": model, "content": list(blocks)}

    def _ending(self, end: End) -> dict[str, Any]:
        own = self.running.task.fields.get("stop") or ()
        if isinstance(end.stopped_by, str) and end.stopped_by in own and end.reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": end.stopped_by}
        return {"stop_reason": REASONS.get(end.reason, "end_turn"), "stop_sequence": None}


class Blocks:
    """The content blocks of a stream: each is opened, grows, and is closed before the next."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: str | None = None

    def chunks(self, event: AnswerEvent) -> list[str]:
        """The events that show one event of the answer."""
        match event:
            case Piece(_, text, _, "reasoning"):
                opening = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""}) if text else []
                delta = {"type": "thinking_delta", "thinking": text}
            case Piece(_, text):
                opening = self._open("text", {"type": "text", "text": ""}) if text else []
                delta = {"type": "text_delta", "text": text}
            case CallStart(_, index, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._open(f"call {index}", block)
            case CallPiece(_, _, text):
                opening, delta = [], {"type": "input_json_delta", "partial_json": text}
            case _:
                return []
        return [*opening, _event("content_block_delta", index=self._index, delta=delta)] if text else []

    def close(self) -> list[str]:
        """The end of the open block; an answer without any gets an empty one."""
        opening = self._open("text", {"type": "text", "text": ""}) if self._index < 0 else []
        return [*opening, _event("content_block_stop", index=self._index)]

    def _open(self, kind: str, block: dict[str, Any]) -> list[str]:
        if kind == self._kind:
            return []
        before = self.close() if self._kind is not None else []
        self._kind = kind
        self._index += 1
        return [*before, _event("content_block_start", index=self._index, content_block=block)]


def usage_object(usage: Usage) -> dict[str, int]:
    """Numbers of tokens; what was found in the cache is not counted as input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def failed(refusal: Refusal) -> str:
    """The event that ends a stream after a failure."""
    return f"event: error\ndata: {encode(refusal.body(PATH))}\n\n"


def _event(kind: str, **content: Any) -> str:
    return f"event: {kind}\ndata: {encode({'type': kind, **content})}\n\n"
