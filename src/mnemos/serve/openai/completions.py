"""`/v1/completions`: the continuation of texts and token ids, with OpenAI's older form of log probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mnemos.decoding.prompt_scores import ScoredToken
from mnemos.engine.answers import AnswerEvent, End, Piece
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import Running, start_all, together, total
from mnemos.serve.openai.extensions import fields_of, kept
from mnemos.serve.openai.shapes import (
    FINGERPRINT,
    Frames,
    OldLogprobs,
    failed,
    finish,
    new_id,
    prompt_logprobs,
    usage_object,
)
from mnemos.serve.openai.types import CompletionRequest, StreamOptions
from mnemos.serve.refusal import Refusal
from mnemos.serve.state import server_of
from mnemos.serve.streams import encode, event_stream
from mnemos.serve.task import Infill, Task

router = APIRouter(tags=["OpenAI"])
DEFAULT_TOKENS = 16  # OpenAI's


@router.post("/v1/completions")
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts."""
    state, connection = server_of(request), connection_of(request)
    tasks = tasks_of(body, connection)
    model = await state.hold(body.model, connection)
    answers = [
        Answer(running, number, body) for number, running in enumerate(await start_all(model, tasks, connection))
    ]
    head = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": FINGERPRINT,
    }
    if not body.stream:
        choices = [choice for answer in answers for choice in await answer.whole()]
        usage = usage_object(total(answer.running.usage for answer in answers))
        return JSONResponse({**head, "choices": choices, "usage": usage})
    return event_stream(chunks(answers, head, body.stream_options or StreamOptions()), state.settings.ping, failed)


def tasks_of(body: CompletionRequest, connection: Connection) -> list[Task]:
    """A neutral request for each prompt."""
    fields, names = fields_of(body, connection)
    fields |= body.given("best_of", "logprobs")
    if not any(name in fields for name in ("max_new_tokens", "max_length")):
        fields["max_new_tokens"] = DEFAULT_TOKENS
    if body.echo and body.logprobs is not None:
        fields.setdefault("prompt_logprobs", body.logprobs)
    elif fields.get("max_new_tokens") == 0:
        fields.setdefault("prompt_logprobs", 0)  # nothing is generated: the prompt is evaluated alone
    prompts = prompts_of(body.prompt, connection.settings.max_prompts)
    if body.suffix:
        if body.echo:
            raise Refusal(400, "suffix and echo are both set; leave one of them out", param="suffix")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise Refusal(400, "suffix is set, and prompt has token ids; give texts", param="suffix")
        prompts = [Infill(prompt, body.suffix) for prompt in prompts]
    begins, names = body.add_special_tokens is not False, {**names, "prompt": "prompt"}
    if body.session is not None and (len(prompts) > 1 or body.echo):
        what = "echo is set" if body.echo else f"prompt has {len(prompts)} prompts"
        raise Refusal(400, f"session is set, and {what}; a session continues with one prompt", param="session")
    common = partial(Task, fields=fields, begins=begins, keep=kept(body), session=body.session, names=names)
    return [common(prompt) for prompt in prompts]


def prompts_of(given: Any, most: int, name: str = "prompt") -> list[Any]:
    """The prompts of a request: a text or token ids, or a list of these, also mixed. Refusal for anything else."""
    prompts = [given] if isinstance(given, str) or _are_ids(given) else given
    if not isinstance(prompts, list) or not prompts:
        shown = "missing" if given is None else f"{str(given)[:80]!r}"
        raise Refusal(400, f"{name} is {shown}; it must be a text, token ids, or a list of these", param=name)
    if len(prompts) > most:
        raise Refusal(400, f"{name} has {len(prompts)} prompts; there may be at most {most}", param=name)
    for index, prompt in enumerate(prompts):
        if not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
            where = name if prompts is not given else f"{name}[{index}]"
            raise Refusal(
                400, f"{where} is {str(prompt)[:80]!r}; it must be a text or token ids, and not empty", param=where
            )
    return prompts


def _are_ids(value: Any) -> bool:
    """Whether it is a list of token ids that fit into the engine's arrays."""
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)


class Answer:
    """The results of one prompt in OpenAI's form. `number`: the prompt's place in the request."""

    def __init__(self, running: Running, number: int, body: CompletionRequest) -> None:
        self.running = running
        self.tokenizer = running.model.engine.tokenizer
        self.first = number * running.config.num_return_sequences
        self.body = body
        self._lengths: dict[int, int] = {}  # characters of each result's text so far, with the echo

    async def whole(self) -> list[dict[str, Any]]:
        """The finished choices."""
        choices = []
        for sequence, result in enumerate(await self.running.results()):
            opening = self._opening(sequence)
            choice = self._choice(Piece(sequence, result.text, result.tokens))
            for name, value in (opening["logprobs"] or {}).items():
                choice["logprobs"][name] = value + choice["logprobs"][name]
            choice |= {"text": opening["text"] + result.text, **finish(result.end), **self._prompt()}
            if self.body.return_token_ids:
                choice["token_ids"] = result.token_ids
            choices.append(choice)
        return choices

    def shows_text_alone(self, sequence: int) -> bool:
        """Whether pieces of a result, from now on, show nothing of their tokens but the text."""
        return sequence in self._lengths and self.body.logprobs is None and not self.body.return_token_ids

    def frames(self, chunk: Callable[[dict[str, Any]], str]) -> Frames:
        """Writes pieces that show text alone. chunk: what is sent for a choice."""
        return Frames(lambda piece: chunk(self._choice(piece)))

    def pieces(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """The choices of the chunks that an event becomes."""
        shown = []
        if event.sequence not in self._lengths:
            opening = {**self._opening(event.sequence), **self._prompt()}
            if opening["text"] or self._prompt():
                shown.append(opening)
        if isinstance(event, Piece):
            choice = self._choice(event)
            ids = [token.token_id for token in event.tokens if token.token_id is not None]
            if self.body.return_token_ids and ids:
                choice["token_ids"] = ids
            if event.text or "token_ids" in choice or (choice["logprobs"] and choice["logprobs"]["tokens"]):
                shown.append(choice)
        elif isinstance(event, End):
            shown.append({"index": self.first + event.sequence, "text": "", "logprobs": None, **finish(event)})
        return shown

    def _opening(self, sequence: int) -> dict[str, Any]:
        """A result's first choice: the echo, if it was asked for, else nothing."""
        text, offsets = self._echo() if self.body.echo else ("", [])
        self._lengths[sequence] = len(text)
        return self._shown(sequence, text, self.running.handle.prompt_logprobs, offsets)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        """The choice of a piece of text; `_opening` comes before it."""
        before = self._lengths[piece.sequence]
        tokens = [token for token in piece.tokens if token.token_id is not None and token.logprob is not None]
        scored = [ScoredToken(token.token_id or 0, token.logprob, token.top_logprobs) for token in tokens]
        return self._shown(piece.sequence, piece.text, scored, [before + token.text_offset for token in tokens])

    def _shown(self, sequence: int, text: str, scored: list[ScoredToken], offsets: list[int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self.first + sequence, "text": text, "logprobs": None, "finish_reason": None}
        if self.body.logprobs is not None and self.tokenizer is not None:
            logprobs = OldLogprobs()
            for token, offset in zip(scored, offsets, strict=False):  # without an echo, the prompt has no offsets
                logprobs.add(token, offset, self.tokenizer, self.body.logprobs)
            choice["logprobs"] = asdict(logprobs)
        return choice

    def _prompt(self) -> dict[str, Any]:
        """What vLLM shows of the prompt, if it was asked for."""
        shown: dict[str, Any] = {"prompt_token_ids": self.running.prompt_ids} if self.body.return_token_ids else {}
        if "prompt_logprobs" in self.body.further:
            shown["prompt_logprobs"] = prompt_logprobs(self.running)
        return shown

    def _echo(self) -> tuple[str, list[int]]:
        """The prompt's text, and how many of its characters come before each of its tokens."""
        prompt, token_ids = self.running.task.prompt, self.running.prompt_ids
        if self.tokenizer is None:
            return "", [0] * len(token_ids)
        given = prompt if isinstance(prompt, str) and self.running.task.keep is None else None
        decoder = self.tokenizer.decoder(skip_special=given is None and self.running.config.skip_special_tokens)
        offsets, length = [], 0
        begin = self.tokenizer.bos_id
        pieces = []
        for place, token in enumerate(token_ids):
            offsets.append(length)
            piece = decoder.push(token)
            if given is not None and place == 0 and token == begin and not given.startswith(piece):
                piece = ""  # it was put before the text that was sent
            length += len(piece)
            pieces.append(piece)
        text = "".join(pieces) + decoder.finish() if given is None else given
        return text, [min(offset, len(text)) for offset in offsets]


async def chunks(answers: list[Answer], head: dict[str, Any], options: StreamOptions) -> AsyncIterator[str]:
    """The events of all answers as they arrive, up to the end mark."""

    def usage() -> dict[str, Any]:
        return usage_object(total(answer.running.usage for answer in answers))

    def chunk(choice: dict[str, Any]) -> str:
        shown = {"usage": usage()} if options.continuous_usage_stats else {}
        return f"data: {encode({**head, 'choices': [choice], **shown})}\n\n"

    frames = [answer.frames(chunk) for answer in answers]
    framed = not options.continuous_usage_stats
    async for number, events in together([answer.running for answer in answers]):
        written = []
        for event in events:
            if framed and isinstance(event, Piece) and answers[number].shows_text_alone(event.sequence):
                if event.text:
                    written.append(frames[number].chunk(event))
                continue
            written += map(chunk, answers[number].pieces(event))
        if written:
            yield "".join(written)
    if options.include_usage:
        yield f"data: {encode({**head, 'choices': [], 'usage': usage()})}\n\n"
    yield "data: [DONE]\n\n"
