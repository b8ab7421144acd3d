"""From a task to its answer: the one way on which every protocol's requests reach the engine."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mnemos.decoding.config import choose_config
from mnemos.decoding.fields import ALIASES, RULES
from mnemos.engine.completion import StreamedToken, Usage
from mnemos.engine.handle import RequestHandle
from mnemos.errors import MnemosError, RequestError, UnsupportedError
from mnemos.serve.catalogue import Served
from mnemos.serve.connection import Connection
from mnemos.serve.events import CallPiece, CallStart, End, Event, Piece
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.reply import PlainReply, Reply
from mnemos.serve.task import Conversation, Task
from mnemos.text.tokenizer import Tokenizer

# Fields of GenerationConfig that a request may not set: they are functions, or the server decides them.
RESERVED = ("logits_processors", "prefix_allowed_tokens_fn", "stopping_criteria", "tenant", "deadline")
FIELDS = tuple(name for name in (*RULES, *ALIASES) if name not in RESERVED)


@dataclass(frozen=True)
class Call:
    """A tool call of a finished answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Result:
    """One finished result: its text, the reasoning before it, its calls, why it ended, and its tokens."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]
    end: End
    tokens: tuple[StreamedToken, ...]  # of the text
    reasoning_tokens: int


class Running:
    """A task in the engine. `prompt_ids`: the prompt as the model reads it."""

    def __init__(self, model: Served, handle: RequestHandle, prompt_ids: list[int], task: Task) -> None:
        self.model = model
        self.handle = handle
        self.prompt_ids = prompt_ids
        self.task = task
        self._replies: dict[int, Reply] = {}

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""
        return self.handle.usage

    async def events(self) -> AsyncIterator[list[Event]]:
        """The answer as it arrives. Refusal if the engine ends it with an error; leaving early cancels it."""
        try:
            async for tokens in self.handle.arrivals():
                yield self._read(tokens)
        except MnemosError as error:
            raise refusal_of(error, dict(self.task.names)) from error

    async def results(self) -> list[Result]:
        """The whole answer, a result for each sequence."""
        try:
            await self.handle
        except MnemosError as error:
            raise refusal_of(error, dict(self.task.names)) from error
        events: list[Event] = []
        async for arrived in self.events():
            events += arrived
        return results_of(events)

    def _read(self, tokens: list[StreamedToken]) -> list[Event]:
        events: list[Event] = []
        for token in tokens:
            reply = self._replies.get(token.sequence)
            if reply is None:
                reply = self._replies[token.sequence] = PlainReply()
            events += reply.push(token)
        return events


async def start(model: Served, task: Task, connection: Connection) -> Running:
    """Puts a task into the engine's queue; it is cancelled when the client goes away.

    Rendering, encoding and the compilation of grammars happen in a worker thread. Refusal for what cannot run.
    """
    try:
        handle, prompt_ids = await asyncio.to_thread(_submit, model, task, connection)
    except (MnemosError, Refusal) as error:
        raise refusal_of(error, dict(task.names)) from error
    connection.notes["model"] = model.name
    connection.on_leave(handle.cancel)
    return Running(model, handle, prompt_ids, task)


def _submit(model: Served, task: Task, connection: Connection) -> tuple[RequestHandle, list[int]]:
    engine = model.engine
    caller = connection.caller
    fields = {**model.offer.defaults, **task.fields}
    salt = fields.pop("cache_salt", None)
    fields["tenant"] = caller.tenant
    fields["cache_salt"] = f"{caller.salt}:{salt or ''}"
    config = choose_config(None, engine.generation_config, **fields)
    prompt_ids = prompt_of(model, task)
    return engine.submit(prompt_ids, config), prompt_ids


def prompt_of(model: Served, task: Task) -> list[int]:
    """The prompt's token ids, as the model reads it."""
    prompt = task.prompt
    if isinstance(prompt, Conversation):
        return _tokenizer(model).encode_chat(
            prompt.messages,
            not prompt.continues,
            tools=[dict(tool) for tool in prompt.tools] or None,
            continue_final_message=prompt.continues,
            **prompt.template,
        )
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("prompt is empty; it must have at least one token")
        return _tokenizer(model).encode(prompt, parse_special=task.special)
    return list(prompt)


def _tokenizer(model: Served) -> Tokenizer:
    tokenizer = model.engine.tokenizer
    if tokenizer is None:
        raise UnsupportedError(f"the model {model.name} has no tokenizer; send token ids")
    return tokenizer


def results_of(events: list[Event]) -> list[Result]:
    """Finished results from all their events."""
    texts: dict[int, dict[str, list[str]]] = {}
    tokens: dict[int, list[StreamedToken]] = {}
    calls: dict[int, dict[int, list[Any]]] = {}
    ends: dict[int, End] = {}
    thought: dict[int, int] = {}
    for event in events:
        own = texts.setdefault(event.sequence, {"text": [], "reasoning": []})
        match event:
            case Piece(sequence, text, made_of, kind):
                own[kind].append(text)
                if kind == "text":
                    tokens.setdefault(sequence, []).extend(made_of)
                else:
                    thought[sequence] = thought.get(sequence, 0) + len(made_of)
            case CallStart(sequence, index, call_id, name):
                calls.setdefault(sequence, {})[index] = [call_id, name, []]
            case CallPiece(sequence, index, text):
                calls[sequence][index][2].append(text)
            case End(sequence):
                ends[sequence] = event
    return [
        Result(
            "".join(texts[sequence]["text"]),
            "".join(texts[sequence]["reasoning"]),
            tuple(Call(one[0], one[1], "".join(one[2])) for one in calls.get(sequence, {}).values()),
            ends.get(sequence, End(sequence, "cancelled")),
            tuple(tokens.get(sequence, ())),
            thought.get(sequence, 0),
        )
        for sequence in sorted(texts)
    ]


def extra_fields(given: dict[str, Any], known: tuple[str, ...], connection: Connection) -> dict[str, Any]:
    """The generation fields among a request's further ones.

    Fields that nobody knows are left out and named in the response's header x-mnemos-ignored, since clients of other
    servers send their own; but a misspelt one is refused. `known`: the protocol's own fields.
    """
    taken, ignored = {}, []
    for name, value in given.items():
        if name in RESERVED:
            raise Refusal(400, f"{name} cannot be set by a request; leave it out", param=name)
        if name in FIELDS:
            if value is not None:
                taken[name] = value
            continue
        meant = difflib.get_close_matches(name, (*FIELDS, *known), n=1, cutoff=0.88)
        if meant:
            raise Refusal(400, f"{name[:80]} is not a field of this request; did you mean {meant[0]}?", param=name[:80])
        ignored.append("".join(c for c in name[:64] if c.isalnum() or c in "_-."))
    if ignored:
        connection.headers["x-mnemos-ignored"] = ", ".join(ignored[:32])
    return taken
