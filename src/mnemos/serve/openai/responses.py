"""`/v1/responses`: answers in typed items, whole or streamed, stored so that a later request can continue them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos.engine.answers import AnswerEvent
from mnemos.engine.chat import Conversation
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import Running, exchange_of, ignore, start
from mnemos.serve.openai.chat import choice_of, tools_of
from mnemos.serve.openai.extensions import fields_of, kept, respond_in
from mnemos.serve.openai.response_items import items_of, messages_of
from mnemos.serve.openai.response_store import Stored
from mnemos.serve.openai.response_writer import ResponseWriter
from mnemos.serve.openai.types import ResponsesRequest
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.streams import event_stream
from mnemos.serve.task import Task

router = APIRouter(tags=["OpenAI"])
ONE_RESULT = ("n", "num_return_sequences")
# Fields that name things which only OpenAI's own servers have.
IMPOSSIBLE = {
    "background": "responses are made while the client waits",
    "conversation": "send the items as input, or previous_response_id",
    "prompt": "send the instructions and the input themselves",
}


@router.post("/v1/responses")
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answers a conversation in items."""
    state, connection = server_of(request), connection_of(request)
    items = items_of(body.input)
    place = await _place(body, request)
    if place is None:
        task = task_of(body, [*await _before(body, request), *items], connection)
    else:  # the session has what comes before
        task = replace(task_of(body, items, connection), session=place[0], turns=place[1])
    model = await state.hold(body.model, connection)
    running = await start(model, task, connection)
    head = _head(body, model.name)
    if running.session is not None:
        head["session"], head["session_turn"] = running.session
    writer = ResponseWriter(head, model.engine.tokenizer, task.fields.get("logprobs"))

    async def store(response: dict[str, Any]) -> None:
        if body.store is not False:
            stored = Stored(response, items, body.previous_response_id)
            await asyncio.to_thread(state.responses.put, connection.caller.name, stored)

    if body.stream:
        return event_stream(_events(running, writer, store), state.settings.ping, writer.fail)
    _write(writer, await running.finished())
    response, _ = writer.end(running.usage)
    await store(response)
    return JSONResponse(response)


@router.post("/v1/responses/input_tokens")
async def count(body: ResponsesRequest, request: Request) -> dict[str, Any]:
    """The number of tokens of a request's prompt."""
    items = [*await _before(body, request), *items_of(body.input)]
    task = task_of(body, items, connection_of(request))
    async with server_of(request).catalogue.use(body.model) as model:
        read = await model.in_thread(exchange_of, model, task)
    return {"object": "response.input_tokens", "input_tokens": len(read.prompt_ids)}


@router.get("/v1/responses/{name}")
async def show(name: str, request: Request) -> dict[str, Any]:
    """A stored response."""
    return (await _stored(request, name)).response


@router.get("/v1/responses/{name}/input_items")
async def show_input(name: str, request: Request) -> dict[str, Any]:
    """The items that a stored response answers."""
    items = (await _stored(request, name)).input
    return {
        "object": "list",
        "data": items[::-1],
        "first_id": items[-1]["id"],
        "last_id": items[0]["id"],
        "has_more": False,
    }


@router.delete("/v1/responses/{name}")
async def delete(name: str, request: Request) -> dict[str, Any]:
    """Forgets a stored response."""
    caller = connection_of(request).caller.name
    if not await asyncio.to_thread(server_of(request).responses.delete, caller, name):
        raise _unknown(name, "response_id")
    return {"id": name, "object": "response", "deleted": True}


def task_of(body: ResponsesRequest, items: list[dict[str, Any]], connection: Connection) -> Task:
    """The neutral request. items: the whole conversation."""
    for name, instead in IMPOSSIBLE.items():
        if getattr(body, name):
            raise Refusal(400, f"{name} is set, which this server does not have; {instead}", param=name)
    fields, names = fields_of(body, connection)
    names |= {"prompt": "input", "messages": "input"}
    for name in ONE_RESULT:
        if fields.get(name, 1) != 1:
            raise Refusal(400, f"{name} is {fields[name]}; a response has one result", param=name)
    if body.max_output_tokens is not None:
        fields["max_new_tokens"], names["max_new_tokens"] = body.max_output_tokens, "max_output_tokens"
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        fields["logprobs"], names["logprobs"] = body.top_logprobs or 0, "top_logprobs"
    if body.truncation == "auto":
        fields["overflow"] = "truncate_left"
    form = (body.text or {}).get("format")
    if form is not None:
        if not isinstance(form, dict):
            raise Refusal(400, f"text.format is {str(form)[:80]!r}; it must be an object", param="text.format")
        respond_in(fields, names, form, "text.format")
    messages, skipped = messages_of(items)
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    tools, others = tools_of(body.tools or [])
    ignore(connection, [*(f"item:{kind}" for kind in skipped), *(f"tool:{kind}" for kind in others)])
    tools, choice = choice_of(body.tool_choice, tools)
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise Refusal(400, f"reasoning.effort is {str(effort)[:80]}; it must be a text", param="reasoning.effort")
    conversation = Conversation(
        messages,
        tools=tools,
        choice=choice,
        parallel=body.parallel_tool_calls,
        thinking=None if effort is None else effort != "none",
        template={} if effort is None else {"reasoning_effort": effort},
    )
    return Task(conversation, fields, keep=kept(body), session=body.session, names=names)


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    return {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.further.get("metadata") or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
    }


def _write(writer: ResponseWriter, events: list[AnswerEvent]) -> str:
    return "".join(writer.add(event) for event in events)


async def _events(
    running: Running, writer: ResponseWriter, store: Callable[[dict[str, Any]], Any]
) -> AsyncIterator[str]:
    yield writer.begin()
    async for events in running.events():
        if text := _write(writer, events):
            yield text
    response, last = writer.end(running.usage)
    await store(response)
    yield last


async def _place(body: ResponsesRequest, request: Request) -> tuple[str, int] | None:
    """The session of the response that a request continues, and its turn there; None if it has none."""
    if body.previous_response_id is None or body.session is not None:
        return None
    caller, store = connection_of(request).caller.name, server_of(request).responses
    previous = await asyncio.to_thread(store.get, caller, body.previous_response_id)
    if previous is None or "session" not in previous.response:
        return None
    return previous.response["session"], previous.response["session_turn"]


async def _before(body: ResponsesRequest, request: Request) -> list[dict[str, Any]]:
    """The items of the conversation that a request continues."""
    name = body.previous_response_id
    if name is None:
        return []
    if body.session is not None:
        raise Refusal(
            400,
            "session and previous_response_id are both set; each names what is continued: leave one of them out",
            param="session",
        )
    caller, store = connection_of(request).caller.name, server_of(request).responses
    items = await asyncio.to_thread(store.history, caller, name)
    if items is None:
        raise _unknown(name, "previous_response_id")
    return items


async def _stored(request: Request, name: str) -> Stored:
    caller = connection_of(request).caller.name
    stored = await asyncio.to_thread(server_of(request).responses.get, caller, name)
    if stored is None:
        raise _unknown(name, "response_id")
    return stored


def _unknown(name: str, param: str) -> Refusal:
    code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
    return Refusal(
        400 if param == "previous_response_id" else 404,
        f"{param} is {name[:80]!r}; there is no such stored response, or not any longer",
        param=param,
        code=code,
    )
