"""Tokens, templates and scores over HTTP, with the paths that evaluation tools and editors know from other servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field

from mnemos.engine.chat import Conversation
from mnemos.errors import MnemosError
from mnemos.serve.catalogue import Served
from mnemos.serve.connection import connection_of
from mnemos.serve.generation import exchange_of, extra_fields, start_all, template_source, tokenizer_of, total
from mnemos.serve.openai.chat import goes_on
from mnemos.serve.openai.completions import prompts_of
from mnemos.serve.openai.shapes import LEAST, token_name, usage_object
from mnemos.serve.openai.types import OpenAIBody, refuse_impossible
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.state import server_of
from mnemos.serve.task import Task
from mnemos.text.tokenizer import Tokenizer
from mnemos.version import __version__

router = APIRouter(tags=["server"])
T = TypeVar("T")
MOST_IDS = 1 << 20  # in one request to /detokenize


class ConversationRequest(OpenAIBody):
    """`POST /apply-template`: a conversation, as `/v1/chat/completions` takes it."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=10_000)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def task(self) -> Task:
        """The neutral request."""
        if self.messages is None:
            raise Refusal(400, "messages is missing; it must be a list of messages", param="messages")
        template = dict(self.chat_template_kwargs or {})
        continues = goes_on(self.messages, self.continue_final_message, self.add_generation_prompt)
        conversation = Conversation(self.messages, tools=self.tools or (), continues=continues, template=template)
        return Task(conversation, names={"prompt": "messages"})


class TokenizeRequest(ConversationRequest):
    """`POST /tokenize`: a text as vLLM (`prompt`) or llama.cpp (`content`) calls it, or a conversation."""

    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(OpenAIBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MOST_IDS)


class ScoreRequest(OpenAIBody):
    """`POST /score`: one text or several; token ids stand for a text too."""

    model: str | None = None
    text: Any = None
    texts: Any = None


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids of a text or a conversation.

    A `prompt` gets the tokens that the model expects around a text unless `add_special_tokens` is false; `content`
    gets them only with `add_special`. Names of special tokens mean those tokens, unless `parse_special` is false.
    """
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise Refusal(
            400,
            f"{' and '.join(given) or 'none of prompt, content and messages'} {'are' if given else 'is'} set; "
            "one of prompt, content and messages must be",
            param=given[1] if given else "prompt",
        )
    model = await _used(body, request)

    def encoded() -> dict[str, Any]:
        tokenizer = tokenizer_of(model)
        if body.messages is not None:
            token_ids = exchange_of(model, body.task()).prompt_ids
        elif body.prompt is not None:
            token_ids = tokenizer.encode(body.prompt, body.add_special_tokens is not False, _parsed(body))
        else:
            token_ids = tokenizer.encode(body.content or "", body.add_special is True, _parsed(body))
        shown: dict[str, Any] = {"tokens": token_ids}
        if body.with_pieces:
            shown["tokens"] = [{"id": token, "piece": _piece(token, tokenizer)} for token in token_ids]
        if body.content is None:
            shown |= {"count": len(token_ids), "max_model_len": model.engine.spec.context_length, "token_strs": None}
        if body.return_token_strs:
            shown["token_strs"] = [token_name(token, tokenizer) for token in token_ids]
        return shown

    return await _in_thread(encoded, given[0])


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids with the names of special tokens, under vLLM's name and llama.cpp's."""
    model = await _used(body, request)

    def decoded() -> dict[str, str]:
        tokenizer = tokenizer_of(model)
        size = tokenizer.vocabulary_size
        for place, token in enumerate(body.tokens):
            if not 0 <= token < size:
                raise Refusal(
                    400,
                    f"tokens[{place}] is {str(token)[:40]}; it must be from 0 to {size - 1}",
                    param=f"tokens[{place}]",
                    code="invalid_value",
                )
        text = tokenizer.decode(body.tokens, skip_special=False)
        return {"prompt": text, "content": text}

    return await _in_thread(decoded, "tokens")


@router.post("/apply-template")
async def apply_template(body: ConversationRequest, request: Request) -> dict[str, str]:
    """The prompt that a conversation becomes.

    It has no begin token where plain texts get one, so that `/v1/completions` reads the prompt as
    `/v1/chat/completions` reads the messages.
    """
    task = body.task()
    model = await _used(body, request)

    def rendered() -> dict[str, str]:
        tokenizer = tokenizer_of(model)
        read = exchange_of(model, task)
        text = read.render() if read.render is not None else ""
        begin = tokenizer.bos_id
        if begin is not None and tokenizer.encode("a")[:1] == [begin]:
            text = text.removeprefix(token_name(begin, tokenizer))
        return {"prompt": text}

    return await _in_thread(rendered, "messages")


@router.post("/score")
async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
    """The log likelihood of each text: the sum over its tokens but the first, which has nothing before it.

    `token_logprobs` has null for that one; the logarithms are natural ones.
    """
    state, connection = server_of(request), connection_of(request)
    for name in ("text_1", "text_2"):
        if name in body.further:
            raise Refusal(
                400,
                f"{name} is set, which compares two texts; a language model scores one text after the other: "
                "send text or texts",
                param=name,
            )
    if body.text is not None and body.texts is not None:
        raise Refusal(400, "text and texts are both set; leave one of them out", param="texts")
    name, given = ("text", body.text) if body.texts is None else ("texts", body.texts)
    prompts = prompts_of(given, state.settings.max_prompts, name)
    fields = {"max_new_tokens": 0, "prompt_logprobs": 0}
    model = await _used(body, request)
    runs = await start_all(model, [Task(one, fields, names={"prompt": name}) for one in prompts], connection)
    scores = []
    for place, running in enumerate(runs):
        if len(running.prompt_ids) < 2:
            where = f"{name}[{place}]" if prompts is given else name
            raise Refusal(400, f"{where} has 1 token; scoring needs at least 2", param=where)
        await running.results()
        logprobs = [None if one.logprob is None else max(one.logprob, LEAST) for one in running.handle.prompt_logprobs]
        scores.append(
            {
                "log_likelihood": sum(value for value in logprobs if value is not None),
                "tokens": running.prompt_ids,
                "token_logprobs": logprobs,
            }
        )
    return {"model": model.name, "scores": scores, "usage": usage_object(total(one.usage for one in runs))}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What a client needs of a tokenizer that it uses over HTTP, in the words of vLLM."""
    served = await _loaded(model, request)
    return await _in_thread(lambda: _described(served), "model")


@router.get("/props")
async def props(request: Request, model: str | None = None) -> dict[str, Any]:
    """A model's context, its template and how many results it computes at once, in the words of llama.cpp."""
    served = await _loaded(model, request)
    engine = served.engine

    def shown() -> dict[str, Any]:
        described = _described(served) if engine.tokenizer is not None else {}
        return {
            "default_generation_settings": {"n_ctx": engine.spec.context_length},
            "total_slots": engine.max_sequences,
            "model_path": served.name,
            "model_alias": served.name,
            "modalities": {"vision": False, "audio": False},
            "chat_template": described.get("chat_template") or "",
            "bos_token": described.get("bos_token") or "",
            "eos_token": described.get("eos_token") or "",
            "build_info": f"mnemos-{__version__}",
        }

    return await _in_thread(shown, "model")


async def _used(body: ConversationRequest | DetokenizeRequest | ScoreRequest, request: Request) -> Served:
    """The model that a body names, loaded until the request ends; the body's further fields are checked."""
    connection = connection_of(request)
    extra_fields(refuse_impossible(body), tuple(type(body).model_fields), connection)
    return await _loaded(body.model, request)


async def _loaded(name: str | None, request: Request) -> Served:
    connection = connection_of(request)
    model = await server_of(request).hold(name, connection)
    connection.notes["model"] = model.name
    return model


async def _in_thread(work: Callable[[], T], prompt: str) -> T:
    """What `work` returns; an error's field `prompt` is called so."""
    try:
        return await asyncio.to_thread(work)
    except MnemosError as error:
        raise refusal_of(error, {"prompt": prompt}) from error


def _parsed(body: TokenizeRequest) -> bool:
    return body.parse_special is not False


def _piece(token_id: int, tokenizer: Tokenizer) -> str | list[int]:
    """A token's text, or its bytes if they are not whole characters."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def _described(model: Served) -> dict[str, Any]:
    tokenizer = tokenizer_of(model)
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: None if token is None else token_name(token, tokenizer) for name, token in named.items()}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **names,
        "vocab_size": tokenizer.vocabulary_size,
        "model_max_length": model.engine.spec.context_length,
        "chat_template": template_source(tokenizer) or None,
    }
