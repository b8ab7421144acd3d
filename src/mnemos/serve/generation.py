"""From a task to its answer: the one way on which every protocol's requests reach the engine."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence, Sized
from dataclasses import replace
from typing import Any
from uuid import uuid4

from mnemos.decoding.config import GenerationConfig, choose_config
from mnemos.decoding.fields import ALIASES, CONSTRAINTS, RULES
from mnemos.engine.answers import Answer, AnswerEvent, answers_of
from mnemos.engine.chat import Conversation, check_tokenizer, config_for
from mnemos.engine.completion import Completion, StreamedToken, Usage
from mnemos.engine.handle import RequestHandle
from mnemos.engine.reply import Replies
from mnemos.engine.session import Message, Session
from mnemos.engine.turn import Turn
from mnemos.errors import FormatError, MnemosError, RequestError, UnsupportedError
from mnemos.memory.session_folder import bytes_of, session_folder
from mnemos.memory.session_records import Summary
from mnemos.serve.catalogue import Served
from mnemos.serve.connection import Connection
from mnemos.serve.keys import Caller
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.settings import Settings
from mnemos.serve.task import Infill, Task
from mnemos.text.infill import infill_ids
from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tools.exchange import Exchange
from mnemos.text.tools.schemas import closed

# Fields of GenerationConfig that a request may not set: they are functions, or the server decides them.
RESERVED = ("logits_processors", "prefix_allowed_tokens_fn", "stopping_criteria", "tenant", "deadline")
FIELDS = tuple(name for name in (*RULES, *ALIASES) if name not in RESERVED)
# Variables of a chat template that are not a request's to set: arguments of the function that renders it.
RESERVED_VARIABLES = ("self", "messages", "tools", "add_generation_prompt", "chat_template", "continue_final_message",
                      "allow_special", "control_texts", "tokenize", "bos_token", "eos_token", "pad_token",
                      "unk_token")  # fmt: skip

SHORT = 1000  # characters or tokens of a prompt that is read in the event loop
FEW = 16  # characters of a field's text, or members of its list, beside such a prompt


class Running:
    """A task in the engine. `exchange`: the prompt as the model reads it; `config`: what it is continued by."""

    def __init__(
        self,
        model: Served,
        handle: RequestHandle,
        exchange: Exchange,
        task: Task,
        config: GenerationConfig,
        session: Session | None = None,
        turn: Turn[Any, Any] | None = None,
    ) -> None:
        self._turn = turn  # of the session, both of which are let go when it is stored
        self._session = session
        self.session = None if session is None else (session.name, session.turns + 1)  # once it is stored
        self.model = model
        self.handle = handle
        self.exchange = exchange
        self.task = task
        self.config = config
        self.completion: Completion | None = None  # once `results` has returned
        self.finishes: list[str] = []  # why the results have ended that were read
        self._replies = Replies(exchange)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids, as the model reads them."""
        return self.exchange.prompt_ids

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""
        return self.handle.usage

    def cancel(self) -> None:
        """Ends the task within one step; a session does not keep it."""
        self._drop()
        self.handle.cancel()

    async def events(self) -> AsyncIterator[list[AnswerEvent]]:
        """The answer as it arrives. Refusal if the engine ends it with an error; leaving early cancels it."""
        try:
            async for tokens in self.handle.arrivals():
                yield self._read(tokens)
            if self._turn is not None:
                await self.model.in_thread(self._turn.result)
                self._turn = self._session = None
        except FormatError as error:
            raise unusable(error) from error
        except MnemosError as error:
            raise refusal_of(error, dict(self.task.names)) from error
        finally:
            self._drop()

    async def finished(self) -> list[AnswerEvent]:
        """The whole answer's events, once it is complete. Instead of `events`, not beside it."""
        try:
            self.completion = await self.handle
        except MnemosError as error:
            raise refusal_of(error, dict(self.task.names)) from error
        return [event async for arrived in self.events() for event in arrived]

    async def results(self) -> list[Answer]:
        """The whole answer, a result for each sequence. Instead of `events`, not beside it."""
        events = await self.finished()
        return answers_of(events, self.completion.choices if self.completion is not None else ())

    def _drop(self) -> None:
        """A turn that is not stored by now is forgotten."""
        turn, self._turn, self._session = self._turn, None, None
        if turn is not None:
            turn.drop()

    def _read(self, tokens: list[StreamedToken]) -> list[AnswerEvent]:
        for token in tokens:
            if token.finish_reason is not None:
                self.model.ends[token.finish_reason] += 1
                self.finishes.append(token.finish_reason)
        return self._replies.read(tokens)


async def start(model: Served, task: Task, connection: Connection) -> Running:
    """Puts a task into the engine's queue; it is cancelled when the client goes away.

    Rendering, the compilation of grammars and the encoding of all but short texts happen in a worker thread. Refusal
    for what cannot run.
    """
    return (await start_all(model, [task], connection))[0]


async def start_all(model: Served, tasks: Sequence[Task], connection: Connection) -> list[Running]:
    """`start` for several tasks; if one of them cannot run, none does."""
    if len(tasks) == 1 and _is_short(tasks[0]):
        running = _submit_all(model, tasks, connection)
    else:
        running = await model.in_thread(_submit_all, model, tasks, connection)
    connection.notes["model"] = model.name
    for one in running:
        connection.start(one)
    return running


def _is_short(task: Task) -> bool:
    """Whether reading the prompt takes less time than a thread would need to begin with it."""
    prompt, values = task.prompt, task.fields.values()
    if isinstance(prompt, Infill) or task.session is not None or not task.fields.keys().isdisjoint(CONSTRAINTS):
        return False
    if isinstance(prompt, Conversation):
        texts = [str(message.get("content", "")) for message in prompt.messages]
        size = SHORT + 1 if prompt.tools else sum(map(len, texts))
    else:
        size = len(prompt)
    return size <= SHORT and all(len(value) <= FEW for value in values if isinstance(value, Sized))


def _submit_all(model: Served, tasks: Sequence[Task], connection: Connection) -> list[Running]:
    running: list[Running] = []
    for task in tasks:
        try:
            running.append(_submit(model, task, connection))
        except (MnemosError, Refusal) as error:
            for other in running:
                other.handle.cancel()
            if isinstance(error, Refusal):
                raise
            raise refusal_of(error, dict(task.names)) from error
    return running


def _submit(model: Served, task: Task, connection: Connection) -> Running:
    from mnemos.decoding.lengths import fit_prompt

    engine = model.engine
    if task.session is not None:
        return _submit_turn(model, task, task.session, connection)
    read = exchange_of(model, task)
    config = _config(model, task, read, connection)
    read = replace(read, prompt_ids=fit_prompt(config, read.prompt_ids, engine.spec))
    handle = engine.submit(read.prompt_ids, config)
    if handle.cached is not None:
        connection.headers["x-mnemos-cached"] = handle.cached.kind
    return Running(model, handle, read, task, config)


def _submit_turn(model: Served, task: Task, name: str, connection: Connection) -> Running:
    """The next turn of a session of the caller's tenant."""
    engine = model.engine
    if task.keep is not None or isinstance(task.prompt, Infill):
        raise Refusal(
            400,
            "session is set, and the prompt would be cut or written around; a session continues all of its text",
            param="session",
        )
    folder = session_folder(engine.session_dir, connection.caller.tenant)
    if bytes_of(folder) > connection.settings.session_bytes:
        raise Refusal(
            507,
            f"your sessions take more than {connection.settings.session_bytes} bytes; forget some of them",
            param="session",
            code="no_room",
        )
    try:
        session = engine.session(name, tenant=connection.caller.tenant)
        if task.turns is not None and session.turns > task.turns:
            session = session.fork(f"{name[:80]}-{uuid4().hex[:12]}", task.turns)
    except FormatError as error:
        raise unusable(error) from error
    if task.turns is not None and session.turns < task.turns:
        raise Refusal(
            400,
            f"previous_response_id is of turn {task.turns} of the session {name!r}, which has {session.turns} now: it "
            "was rewound or forgotten; send the items as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if not isinstance(task.prompt, Conversation):
        config = _config(model, task, Exchange([]), connection)
        prompt = task.prompt if isinstance(task.prompt, str) else list(task.prompt)
        turn = session.submit(prompt, config)
        return Running(model, turn.request, Exchange(turn.request.prompt_ids), task, config, session, turn)
    conversation, made = task.prompt, list[tuple[Exchange, GenerationConfig]]()

    def read(messages: Sequence[Message]) -> tuple[Exchange, GenerationConfig]:
        whole = replace(task, prompt=replace(conversation, messages=messages))
        exchange = exchange_of(model, whole)
        made.append((exchange, _config(model, whole, exchange, connection)))
        return made[-1]

    answer = session.answer([dict(message) for message in conversation.messages], read, conversation.continues)
    exchange, config = made[-1]
    return Running(model, answer.request, exchange, task, config, session, answer)


def sessions_of(model: Served, connection: Connection) -> list[Summary]:
    """The sessions of the caller's tenant, without files that cannot be read."""
    found = model.engine.sessions(tenant=connection.caller.tenant)
    return [one for one in found if not isinstance(one, FormatError)]


def unusable(error: FormatError) -> Refusal:
    """The refusal for a session that is damaged or of another model."""
    return Refusal(409, str(error), param="session", code="session_unusable")


def _config(model: Served, task: Task, read: Exchange, connection: Connection) -> GenerationConfig:
    engine, caller = model.engine, connection.caller
    fields = {**model.offer.defaults, **task.fields}
    salt = fields.pop("cache_salt", None)
    if salt is not None:
        RULES["cache_salt"].apply("cache_salt", salt)
    if "json_schema" in fields:
        fields["json_schema"] = closed(fields["json_schema"])
    fields["tenant"] = caller.tenant
    fields["cache_salt"] = salted(caller, salt)
    config = choose_config(None, engine.generation_config, **fields)
    if isinstance(task.prompt, Conversation):
        config = config_for(config, read, engine.spec.context_length)
    check_results(config, connection.settings)
    return config


def salted(caller: Caller, salt: str | None) -> str:
    """The cache salt of a caller's requests, with what they choose themselves."""
    return hashlib.sha256(repr((caller.salt, salt)).encode()).hexdigest()


def check_results(config: GenerationConfig, settings: Settings) -> None:
    """Refusal if one prompt would be given more texts than the server allows."""
    counts = {"n": config.num_return_sequences, "best_of": config.best_of or 0, "num_beams": config.beams}
    for name, count in counts.items():
        if count > settings.max_results:
            raise Refusal(
                400, f"{name} is {count}; it must be at most {settings.max_results}", param=name, code="invalid_value"
            )


def exchange_of(model: Served, task: Task) -> Exchange:
    """The prompt as the model reads it, and what its answer may consist of."""
    found = _whole_exchange(model, task)
    if task.keep is None:
        return found
    return replace(found, prompt_ids=found.prompt_ids[max(len(found.prompt_ids) - task.keep, 0) :])


def _whole_exchange(model: Served, task: Task) -> Exchange:
    prompt = task.prompt
    if isinstance(prompt, Conversation):
        for name in prompt.template:
            if name in RESERVED_VARIABLES:
                raise Refusal(
                    400,
                    f"chat_template_kwargs.{name} is set, which the server decides itself; leave it out",
                    param=f"chat_template_kwargs.{name}",
                )
        return prompt.exchange(check_tokenizer(model.engine.tokenizer, f"the model {model.name}"))
    if isinstance(prompt, Infill):
        token_ids = infill_ids(tokenizer_of(model), prompt.prefix, prompt.suffix)
        if token_ids is None:
            raise Refusal(
                400,
                f"suffix is set, and {model.name} was not trained to write between two texts: its vocabulary has no "
                "tokens for that; leave it out",
                param="suffix",
            )
        return Exchange(token_ids)
    if isinstance(prompt, str):
        token_ids = tokenizer_of(model).encode(prompt, task.begins, task.special)
        if not token_ids:
            raise RequestError("prompt is empty; it must have at least one token")
        return Exchange(token_ids)
    return Exchange(list(prompt))


async def together(running: Sequence[Running]) -> AsyncIterator[tuple[int, list[AnswerEvent]]]:
    """The events of several tasks as they arrive, each with the task's number."""
    if len(running) == 1:  # no task for each arrival
        async for events in running[0].events():
            yield 0, events
        return
    streams = [one.events() for one in running]
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                try:
                    events = future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, events
    finally:
        for future in waiting:
            future.cancel()


def total(usages: Iterable[Usage]) -> Usage:
    """The numbers of tokens of several tasks."""
    counts = [(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) for usage in usages]
    return Usage(*(sum(column) for column in zip(*counts, strict=True)))


def tokenizer_of(model: Served) -> Tokenizer:
    """The model's tokenizer. UnsupportedError if it has none."""
    tokenizer = model.engine.tokenizer
    if tokenizer is None:
        raise UnsupportedError(f"the model {model.name} has no tokenizer; send token ids to /v1/completions")
    return tokenizer


def template_source(tokenizer: Tokenizer) -> str:
    """The Jinja text of the chat template; empty for a tokenizer that cannot write conversations."""
    try:
        return tokenizer.template_for(None, None).source
    except (MnemosError, AttributeError):  # another library's tokenizer has no such method
        return ""


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
        meant = difflib.get_close_matches(name, (*FIELDS, *known), n=1, cutoff=0.9)
        if meant:
            raise Refusal(400, f"{name[:80]} is not a field of this request; did you mean {meant[0]}?", param=name[:80])
        ignored.append(name)
    ignore(connection, ignored)
    return taken


def ignore(connection: Connection, names: Iterable[str]) -> None:
    """Names what was skipped in the response's header x-mnemos-ignored."""
    known = connection.headers.get("x-mnemos-ignored")
    named = ["".join(c for c in name[:64] if c.isascii() and (c.isalnum() or c in "_-.:")) for name in names]
    if named:
        shown = dict.fromkeys([*([known] if known else []), *named])
        connection.headers["x-mnemos-ignored"] = ", ".join(list(shown)[:32])
