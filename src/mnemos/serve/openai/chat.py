"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos import __version__
from mnemos.serve.connection import connection_of
from mnemos.serve.events import CallPiece, CallStart, End, Event, Piece
from mnemos.serve.generation import Result, Running, extra_fields, start
from mnemos.serve.openai.shapes import logprob_entries, new_id, usage_object
from mnemos.serve.openai.types import FINISHES, ChatRequest, refuse_impossible
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.streams import encode, event_stream
from mnemos.serve.task import Conversation, Task, ToolChoice

router = APIRouter(tags=["OpenAI"])
FINGERPRINT = f"mnemos-{__version__}"
NAMES = {"json_schema": "response_format", "logprobs": "top_logprobs"}


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    state, connection = server_of(request), connection_of(request)
    task = task_of(body, extra_fields(refuse_impossible(body.further), tuple(ChatRequest.model_fields), connection))
    options = body.stream_options
    if options is not None and not body.stream:
        raise Refusal(400, "stream_options is set and stream is not; set stream to true", param="stream_options")
    model = await connection.stack.enter_async_context(state.catalogue.use(body.model))
    running = await start(model, task, connection)
    answer = ChatAnswer(running, body.top_logprobs or 0 if body.logprobs else None)
    if not body.stream:
        results = await running.results()
        return JSONResponse(answer.whole(results))
    usage, continuous = (bool(options and value) for value in (
        options and options.include_usage, options and options.continuous_usage_stats))  # fmt: skip
    return event_stream(answer.chunks(usage, continuous), state.settings.ping, failed)


def task_of(body: ChatRequest, more: dict[str, Any]) -> Task:
    """The neutral request."""
    fields = {**more, **body.given("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty",
                                   "logit_bias")}  # fmt: skip
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if (value := getattr(body, limit)) is not None:
        fields["max_new_tokens"] = value
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise Refusal(400, "top_logprobs is set and logprobs is not; set logprobs to true", param="top_logprobs")
    constrain(fields, body.response_format)
    conversation = Conversation(
        body.messages,
        tools=body.tools or (),
        choice=choice_of(body.tool_choice, body.tools),
        parallel=body.parallel_tool_calls is not False,
        continues=_continues(body),
        template=body.chat_template_kwargs or {},
    )
    return Task(conversation, fields, names={**NAMES, "max_new_tokens": limit})


def constrain(fields: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    """Adds the constraint that `response_format` asks for."""
    if wanted is None or wanted.get("type") == "text":
        return
    if wanted.get("type") == "json_object":
        fields["json_schema"] = wanted.get("schema", True)
        return
    if wanted.get("type") != "json_schema":
        raise Refusal(
            400,
            f"response_format.type is {str(wanted.get('type'))[:80]!r}; it must be text, json_object or json_schema",
            param="response_format.type",
        )
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise Refusal(
            400, "response_format.json_schema.schema is missing; it must be a JSON schema", param="response_format"
        )
    fields["json_schema"] = schema


def choice_of(given: str | dict[str, Any] | None, tools: list[dict[str, Any]] | None) -> ToolChoice:
    """Whether and which tool must be called."""
    names = [
        str(tool.get("function", {}).get("name")) for tool in tools or () if isinstance(tool.get("function"), dict)
    ]
    if given is None:
        return ToolChoice("auto" if tools else "none")
    if given in ("none", "auto", "required"):
        if given == "required" and not names:
            raise Refusal(400, "tool_choice is 'required' and there are no tools", param="tool_choice")
        return ToolChoice("none" if not names else given)  # type: ignore[arg-type]
    function = given.get("function", given) if isinstance(given, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise Refusal(
            400,
            f"tool_choice is {str(given)[:80]!r}; it must be none, auto, required or one of the tools "
            f"({', '.join(names) or 'there are none'})",
            param="tool_choice",
        )
    return ToolChoice("required", str(name))


def _continues(body: ChatRequest) -> bool:
    """Whether the last message is continued: asked for, or the assistant's."""
    if body.continue_final_message is not None:
        return body.continue_final_message
    return body.messages[-1].get("role") == "assistant" and body.add_generation_prompt is not True


class ChatAnswer:
    """Writes an answer as OpenAI's chat objects. `top`: the number of alternatives to report; None for none at all."""

    def __init__(self, running: Running, top: int | None) -> None:
        self.running = running
        self.top = top
        self.head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": running.model.name,
            "system_fingerprint": FINGERPRINT,
        }

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """`chat.completion`."""
        thought = sum(result.reasoning_tokens for result in results)
        choices = []
        for index, result in enumerate(results):
            message: dict[str, Any] = {"role": "assistant", "content": result.text or (None if result.calls else "")}
            if result.reasoning:
                message["reasoning_content"] = result.reasoning
            if result.calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in result.calls
                ]
            choice: dict[str, Any] = {"index": index, "message": message, "logprobs": self._logprobs(result.tokens)}
            choices.append({**choice, **finish(result.end)})
        usage = usage_object(self.running.usage, thought)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(self, usage: bool, continuous: bool) -> AsyncIterator[str]:
        """`chat.completion.chunk` events, up to the end mark."""
        started: set[int] = set()
        thought = 0
        async for events in self.running.events():
            for event in events:
                if event.sequence not in started:
                    started.add(event.sequence)
                    opening = {"index": event.sequence, "delta": {"role": "assistant", "content": ""}}
                    yield self._chunk({**opening, "logprobs": None, "finish_reason": None})
                if isinstance(event, Piece) and event.kind == "reasoning":
                    thought += len(event.tokens)
                choice = self._choice(event)
                if choice is not None:
                    yield self._chunk(choice, usage_object(self.running.usage, thought) if continuous else None)
        if usage:
            last = {**self.head, "object": "chat.completion.chunk", "choices": []}
            yield f"data: {encode({**last, 'usage': usage_object(self.running.usage, thought)})}\n\n"
        yield "data: [DONE]\n\n"

    def _choice(self, event: Event) -> dict[str, Any] | None:
        """A chunk's choice; None if the event adds nothing that is seen."""
        logprobs = None
        match event:
            case Piece(_, text, tokens, kind):
                logprobs = self._logprobs(tokens) if kind == "text" else None
                if not text and not (logprobs and logprobs["content"]):
                    return None
                delta: dict[str, Any] = {"content" if kind == "text" else "reasoning_content": text}
            case CallStart(_, index, call_id, name):
                function = {"name": name, "arguments": ""}
                delta = {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallPiece(_, index, text):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case End():
                return {"index": event.sequence, "delta": {}, "logprobs": None, **finish(event)}
        return {"index": event.sequence, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _chunk(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> str:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {encode(chunk if usage is None else {**chunk, 'usage': usage})}\n\n"

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        tokenizer = self.running.model.engine.tokenizer
        if self.top is None or tokenizer is None:
            return None
        return {"content": logprob_entries(tokens, tokenizer, self.top), "refusal": None}


def finish(end: End) -> dict[str, Any]:
    """The end of a choice; `stop_reason` is vLLM's: the string or token that ended it."""
    shown: dict[str, Any] = {"finish_reason": FINISHES[end.reason], "stop_reason": end.stopped_by}
    return shown if end.error is None else {**shown, "error": end.error}


def failed(refusal: Refusal) -> str:
    """The events that end a stream after a failure."""
    return f"data: {encode(refusal.body('/v1/'))}\n\ndata: [DONE]\n\n"
