"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos.engine.answers import Answer, AnswerEvent, CallPiece, CallStart, End, Piece
from mnemos.engine.chat import Conversation, ToolChoice
from mnemos.engine.completion import StreamedToken
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import Running, ignore, start
from mnemos.serve.openai.extensions import fields_of, kept
from mnemos.serve.openai.shapes import (
    FINGERPRINT,
    Frames,
    failed,
    finish,
    logprob_entries,
    new_id,
    prompt_logprobs,
    usage_object,
)
from mnemos.serve.openai.types import ChatRequest, StreamOptions
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.streams import encode, event_stream
from mnemos.serve.task import Task

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    state, connection = server_of(request), connection_of(request)
    task = task_of(body, connection)
    model = await state.hold(body.model, connection)
    running = await start(model, task, connection)
    answer = ChatAnswer(running, body.top_logprobs or 0 if body.logprobs else None, body.return_token_ids is True)
    if not body.stream:
        results = await running.results()
        return JSONResponse(answer.whole(results))
    options = body.stream_options or StreamOptions()
    chunks = answer.chunks(options.include_usage is True, options.continuous_usage_stats is True)
    return event_stream(chunks, state.settings.ping, failed)


def task_of(body: ChatRequest, connection: Connection) -> Task:
    """The neutral request."""
    fields, names = fields_of(body, connection)
    if body.max_completion_tokens is not None:
        fields["max_new_tokens"], names["max_new_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    if body.logprobs:
        fields["logprobs"], names["logprobs"] = body.top_logprobs or 0, "top_logprobs"
    elif body.top_logprobs:
        raise Refusal(400, "top_logprobs is set and logprobs is not; set logprobs to true", param="top_logprobs")
    effort = body.reasoning_effort
    template = dict(body.chat_template_kwargs or {})
    if effort is not None:
        template.setdefault("reasoning_effort", effort)
    tools, others = tools_of(body.tools or [])
    ignore(connection, [f"tool:{kind}" for kind in others])
    tools, choice = choice_of(body.tool_choice, tools)
    conversation = Conversation(
        body.messages,
        tools=tools,
        choice=choice,
        parallel=body.parallel_tool_calls,
        continues=goes_on(body.messages, body.continue_final_message, body.add_generation_prompt),
        thinking=None if effort is None else effort != "none",
        budget=body.thinking_token_budget,
        template=template,
    )
    return Task(conversation, fields, keep=kept(body), session=body.session, names={**names, "prompt": "messages"})


def tools_of(given: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Function tools in the form of chat completions, and the types of all others, which a model cannot call here."""
    functions, others = [], []
    for tool in given:
        if tool.get("type", "function") == "function":
            own = tool.get("function")
            function = own if isinstance(own, dict) else {name: value for name, value in tool.items() if name != "type"}
            functions.append({"type": "function", "function": function})
        else:
            others.append(str(tool["type"]))
    return functions, others


def choice_of(given: Any, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ToolChoice]:
    """The tools that may be called, and whether and which one must be."""
    wanted = given
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        inner = given.get("allowed_tools", given)  # nested in chat completions, not in responses
        inner = inner if isinstance(inner, dict) else {}
        named = inner.get("tools")
        named = [tool for tool in named if isinstance(tool, dict)] if isinstance(named, list) else []
        allowed = [_function(tool).get("name") for tool in named]
        tools = [tool for tool in tools if tool["function"].get("name") in allowed]
        wanted = inner.get("mode", "auto")
    names = [str(tool["function"].get("name")) for tool in tools]
    if wanted is None:
        return tools, ToolChoice("auto" if tools else "none")
    if wanted in ("none", "auto", "required"):
        if wanted == "required" and not names:
            raise Refusal(400, "tool_choice is 'required' and there are no tools", param="tool_choice")
        return tools, ToolChoice("none" if not names else wanted)
    name = _function(wanted).get("name") if isinstance(wanted, dict) else None
    if name not in names:
        raise Refusal(
            400,
            f"tool_choice is {str(given)[:80]!r}; it must be none, auto, required or one of the tools "
            f"({', '.join(names) or 'there are none'})",
            param="tool_choice",
        )
    return tools, ToolChoice("required", str(name))


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """The function of a tool, which stands beside its type in responses."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def goes_on(messages: list[dict[str, Any]], asked: bool | None, prompted: bool | None) -> bool:
    """Whether the last message is continued: if `asked`, or, unasked, if it is the assistant's.

    asked, prompted: continue_final_message and add_generation_prompt.
    """
    if asked is not None:
        return asked
    return messages[-1].get("role") == "assistant" and prompted is not True


class ChatAnswer:
    """Writes an answer as OpenAI's chat objects.

    top        the number of alternatives to report for each token, or None for no log probabilities at all
    token_ids  show the ids of prompt and answer, as vLLM does
    """

    def __init__(self, running: Running, top: int | None, token_ids: bool) -> None:
        self.running = running
        self.top = top
        self.token_ids = token_ids
        self.head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": running.model.name,
            "system_fingerprint": FINGERPRINT,
        }

    def whole(self, results: list[Answer]) -> dict[str, Any]:
        """`chat.completion`."""
        thought = sum(result.reasoning_tokens for result in results)
        choices = []
        for index, result in enumerate(results):
            choice: dict[str, Any] = {
                "index": index,
                "message": result.message,
                "logprobs": self._logprobs(result.tokens),
            }
            if self.token_ids:
                choice["token_ids"] = result.token_ids
            choices.append({**choice, **finish(result.end)})
        usage = usage_object(self.running.usage, thought)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage, **self._prompt()}

    async def chunks(self, usage: bool, continuous: bool) -> AsyncIterator[str]:
        """`chat.completion.chunk` events as they arrive, those of one arrival together, up to the end mark."""
        started: set[int] = set()
        thought = 0
        frames = Frames(lambda piece: self._chunk(self._choice(piece) or {}, {}))
        framed = self.top is None and not self.token_ids and not continuous
        async for events in self.running.events():
            written = []
            for event in events:
                if event.sequence not in started:
                    started.add(event.sequence)
                    opening = {"index": event.sequence, "delta": {"role": "assistant", "content": ""}}
                    shown = self._prompt() if len(started) == 1 else {}
                    written.append(self._chunk({**opening, "logprobs": None, "finish_reason": None}, shown))
                if isinstance(event, Piece) and event.kind == "reasoning":
                    thought += len(event.tokens)
                if framed and isinstance(event, Piece):
                    if event.text:
                        written.append(frames.chunk(event))
                    continue
                choice = self._choice(event)
                if choice is not None:
                    shown = {"usage": usage_object(self.running.usage, thought)} if continuous else {}
                    written.append(self._chunk(choice, shown))
            if written:
                yield "".join(written)
        if usage:
            last = {**self.head, "object": "chat.completion.chunk", "choices": []}
            yield f"data: {encode({**last, 'usage': usage_object(self.running.usage, thought)})}\n\n"
        yield "data: [DONE]\n\n"

    def _choice(self, event: AnswerEvent) -> dict[str, Any] | None:
        """A chunk's choice; None if the event adds nothing that is seen."""
        logprobs, more = None, {}
        match event:
            case Piece(_, text, tokens, kind):
                logprobs = self._logprobs(tokens) if kind == "text" else None
                more = self._ids(tokens)
                if not text and not more and not (logprobs and logprobs["content"]):
                    return None
                delta: dict[str, Any] = {"content" if kind == "text" else "reasoning_content": text}
            case CallStart(_, index, call_id, name):
                function = {"name": name, "arguments": ""}
                delta = {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            case CallPiece(_, index, text):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case End():
                return {"index": event.sequence, "delta": {}, "logprobs": None, **finish(event)}
        return {"index": event.sequence, "delta": delta, "logprobs": logprobs, "finish_reason": None, **more}

    def _chunk(self, choice: dict[str, Any], more: Mapping[str, Any]) -> str:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {encode(chunk)}\n\n"

    def _prompt(self) -> dict[str, Any]:
        """What is shown of the prompt, if it was asked for."""
        shown: dict[str, Any] = {"prompt_token_ids": self.running.prompt_ids} if self.token_ids else {}
        if self.running.config.prompt_logprobs is not None:
            shown["prompt_logprobs"] = prompt_logprobs(self.running)
        return shown

    def _ids(self, tokens: Iterable[StreamedToken]) -> dict[str, Any]:
        ids = [token.token_id for token in tokens if token.token_id is not None]
        return {"token_ids": ids} if self.token_ids and ids else {}

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        tokenizer = self.running.model.engine.tokenizer
        if self.top is None or tokenizer is None:
            return None
        return {"content": logprob_entries(tokens, tokenizer, self.top), "refusal": None}
