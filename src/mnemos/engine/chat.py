"""Conversations: messages in, and an answer whose text, reasoning and tool calls are apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mnemos.engine.answers import Answer, AnswerEvent, Call, answers_of
from mnemos.engine.completion import Completion, Usage
from mnemos.engine.handle import RequestHandle
from mnemos.engine.reply import Replies
from mnemos.engine.request import Timings
from mnemos.errors import RequestError, UnsupportedError, shown
from mnemos.text.conversation import check_messages
from mnemos.text.tools.exchange import Exchange, exchange, functions_of

if TYPE_CHECKING:
    from mnemos.contract import ModelSpec
    from mnemos.decoding.config import GenerationConfig
    from mnemos.memory.response_cache import Cached, Question
    from mnemos.text.tokenizer import Tokenizer

MODES = ("none", "auto", "required")
OPTIONS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "continue_final_message",
    "thinking",
    "thinking_token_budget",
    "chat_template_kwargs",
)
SET_HERE = ("messages", "tools", "add_generation_prompt", "continue_final_message")  # variables of every template


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may, must or must not be tool calls. `name`: the one tool that must be called."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages to answer, in the form that `mnemos.text.conversation` takes.

    tools      function tools: {"type": "function", "function": {"name", "description", "parameters"}}
    parallel   whether several calls may be made in one answer; None: unless a call is forced
    continues  the last message is the assistant's, and the answer continues it
    thinking   whether the model reasons first; None leaves it to the template
    budget     most tokens of reasoning, or None
    template   further variables for the chat template
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = ToolChoice()
    parallel: bool | None = None
    continues: bool = False
    thinking: bool | None = None
    budget: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> Question | None:
        """The last message, if it is a text of the user's, and all else that the answer depends on."""
        from mnemos.memory.response_cache import Question

        *before, last = self.messages
        if last.get("role") != "user" or not isinstance(last.get("content"), str):
            return None
        return Question(last["content"], repr(replace(self, messages=before)))

    def exchange(self, tokenizer: Tokenizer) -> Exchange:
        """The prompt, what generating its answer needs, and how that is read."""
        return exchange(
            tokenizer,
            self.messages,
            self.tools,
            mode=self.choice.mode,
            name=self.choice.name,
            parallel=self.parallel,
            continues=self.continues,
            thinking=self.thinking,
            budget=self.budget,
            template=self.template,
        )


@dataclass(frozen=True)
class ChatCompletion:
    """A conversation's answers; its own properties are those of the first one."""

    answers: list[Answer]
    completion: Completion = field(repr=False)

    @property
    def text(self) -> str:
        """The answer without reasoning and calls."""
        return self.answers[0].text

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered."""
        return self.answers[0].reasoning

    @property
    def calls(self) -> tuple[Call, ...]:
        """The tool calls."""
        return self.answers[0].calls

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the assistant, to be appended to the conversation."""
        return self.answers[0].message

    @property
    def finish_reason(self) -> str:
        """stop, length, tool_calls, repetition, time, error or cancelled."""
        return self.answers[0].finish_reason

    @property
    def cached(self) -> Cached | None:
        """Why nothing was generated, for an answer from a ResponseCache; else None."""
        return self.completion.cached

    @property
    def usage(self) -> Usage:
        """Numbers of tokens."""
        return self.completion.usage

    @property
    def timings(self) -> Timings:
        """When the request was queued and started, and when its tokens came."""
        return self.completion.timings


class ChatHandle:
    """A submitted conversation.

    Iterate over it (`for` or `async for`) for the events of its answers as they arrive, or wait for `result()` or, in
    asyncio, `await` it. Leaving an iteration early cancels it, and so does dropping it.
    """

    def __init__(self, handle: RequestHandle, exchange: Exchange) -> None:
        self.request = handle
        self._exchange = exchange

    @property
    def usage(self) -> Usage:
        """The numbers of tokens so far."""
        return self.request.usage

    def cancel(self) -> None:
        """Ends the answers within one step. Output so far can still be read."""
        self.request.cancel()

    def result(self) -> ChatCompletion:
        """Waits for the end. Raises the request's error; a cancelled one returns its output so far."""
        return self._read(self.request.result())

    def __iter__(self) -> Iterator[AnswerEvent]:
        replies = Replies(self._exchange)
        for token in self.request:
            yield from replies.read([token])

    async def __aiter__(self) -> AsyncIterator[AnswerEvent]:
        replies = Replies(self._exchange)
        async for tokens in self.request.arrivals():
            for event in replies.read(tokens):
                yield event

    def __await__(self) -> Generator[Any, None, ChatCompletion]:
        return self._read((yield from self.request.__await__()))

    def _read(self, completion: Completion) -> ChatCompletion:
        return ChatCompletion(answers_of(Replies(self._exchange).read(self.request), completion.choices), completion)


def conversation_of(
    messages: Any,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str,
    parallel: bool | None,
    continues: bool | None,
    thinking: bool | None,
    budget: int | None,
    template: Mapping[str, Any] | None,
) -> Conversation:
    """A conversation from what a program passes to `InferenceEngine.chat`. RequestError for what is wrong in it."""
    checked = check_messages(messages)
    if not checked:
        raise RequestError("messages is empty; a conversation needs at least one message")
    names = [function["name"] for function in functions_of(tools)]
    if tool_choice in names and tool_choice not in MODES:
        choice = ToolChoice("required", tool_choice)
    elif tool_choice in MODES and (names or tool_choice != "required"):
        choice = ToolChoice(tool_choice)  # type: ignore[arg-type]
    else:
        raise RequestError(
            f"tool_choice is {shown(tool_choice)}; it must be none, auto, required or one of the tools "
            f"({', '.join(names) or 'there are none'})"
        )
    for name in SET_HERE:
        if name in (template or {}):
            raise RequestError(f"chat_template_kwargs.{name} is set by the call's own arguments; leave it out")
    if continues is None:
        continues = checked[-1]["role"] == "assistant"
    return Conversation(checked, tools, choice, parallel, continues, thinking, budget, template or {})


def read_chat(
    messages: Any, tokenizer: Tokenizer, spec: ModelSpec, config: GenerationConfig, options: Mapping[str, Any]
) -> tuple[Conversation, Exchange, GenerationConfig]:
    """A conversation, its prompt, and what that is continued by.

    options: those of `InferenceEngine.submit_chat`, which documents them, and fields of GenerationConfig.
    """
    own = {name: options[name] for name in options if name in OPTIONS}
    fields = {name: value for name, value in options.items() if name not in OPTIONS}
    conversation = conversation_of(
        messages,
        own.get("tools", ()),
        own.get("tool_choice", "auto"),
        parallel=own.get("parallel_tool_calls"),
        continues=own.get("continue_final_message"),
        thinking=own.get("thinking"),
        budget=own.get("thinking_token_budget"),
        template=own.get("chat_template_kwargs"),
    )
    read = conversation.exchange(tokenizer)
    chosen = config_for(config.with_overrides(**fields) if fields else config, read, spec.context_length)
    return conversation, read, chosen


def check_tokenizer(tokenizer: Any, model: str = "the model") -> Tokenizer:
    """The tokenizer, if it can write conversations. UnsupportedError if there is none that can."""
    if not hasattr(tokenizer, "encode_chat"):
        what = "no tokenizer" if tokenizer is None else "a tokenizer without chat templates"
        raise UnsupportedError(f"{model} has {what}; give it texts or token ids instead of messages")
    found: Tokenizer = tokenizer
    return found


def config_for(config: GenerationConfig, exchange: Exchange, context_length: int) -> GenerationConfig:
    """The config that generates a conversation's answers: with what tools and reasoning need, and room for the end.

    Without a length of its own, an answer may fill the context: it ends by itself. RequestError if the config
    constrains the text and a tool must be called.
    """
    needed = dict(exchange.fields)
    if "grammar" in needed and config.constraint is not None:
        raise RequestError(
            f"tool_choice forces a call, and {config.constraint} constrains the text; leave one of them out"
        )
    for name in ("stop", "logits_processors"):
        own = getattr(config, name)
        if name in needed and own:
            needed[name] = [*([own] if isinstance(own, str) or callable(own) else own), *needed[name]]
    if config.max_new_tokens is None and config.max_length is None:
        needed["max_length"] = context_length
    return config.with_overrides(**needed) if needed else config
