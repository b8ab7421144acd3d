"""OpenAI's requests, as far as a text model can honour them, and the names of what cannot be honoured."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mnemos.serve.body import Body
from mnemos.serve.refusal import Refusal

# Accepted without effect: they concern OpenAI's accounts and hosting.
ACCEPTED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "verbosity",
    "prediction",
)
# A text model cannot honour these; each with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
}
# Texts that become programs in the server: only the model's own are run.
PROGRAMS = ("chat_template",)


class StreamOptions(Body):
    """What a stream reports besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIBody(Body):
    """A request of OpenAI's. elsewhere: fields of its other requests, and what they are called in this one."""

    elsewhere: ClassVar[dict[str, str]] = {}


class Extended(OpenAIBody):
    """What all requests for texts share: fields of other servers. Those named like the engine's own need no row."""

    temperature: float | None = None
    top_p: float | None = None
    # vLLM's
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    use_beam_search: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    # llama.cpp's
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    typical: float | None = None
    # this server's own
    session: str | None = None


class GenerationRequest(Extended):
    """What requests for chat and for plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None  # vLLM's

    @model_validator(mode="after")
    def _needs_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options is set and stream is not; set stream to true", param="stream_options")
        return self


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    elsewhere: ClassVar = {
        "prompt": "messages",
        "input": "messages",
        "instructions": "messages",
        "max_output_tokens": "max_completion_tokens",
        "text": "response_format",
    }

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # vLLM's names
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    elsewhere: ClassVar = {
        "messages": "prompt",
        "input": "prompt",
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "top_logprobs": "logprobs",
    }

    prompt: Any = None
    suffix: str | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    # vLLM's name
    add_special_tokens: bool | None = None


class EmbeddingRequest(OpenAIBody):
    """`POST /v1/embeddings`."""

    elsewhere: ClassVar = {
        "prompt": "input",
        "messages": "input",
    }

    input: Any = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    # others' names
    pooling: Literal["mean", "last"] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)


class ResponsesRequest(Extended):
    """`POST /v1/responses`."""

    elsewhere: ClassVar = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "logprobs": "top_logprobs",
        "reasoning_effort": "reasoning.effort",
    }

    input: Any = None
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None


def refuse_impossible(body: OpenAIBody) -> dict[str, Any]:
    """A request's further fields without those that OpenAI knows and the server does not need.

    Refusal for what cannot be honoured, and for a field of another of OpenAI's requests.
    """
    rest = {}
    for name, value in body.further.items():
        if name in REFUSED:
            if value not in REFUSED[name]:
                raise Refusal(
                    400, f"{name} is set; this server's models read and write text only: leave it out", param=name
                )
        elif name in PROGRAMS and value is not None:
            raise Refusal(400, f"{name} is set; the server uses the model's own: leave it out", param=name)
        elif name in body.elsewhere and value is not None:
            raise Refusal(400, f"{name} is no field of this request; it is {body.elsewhere[name]} here", param=name)
        elif name not in ACCEPTED:
            rest[name] = value
    return rest


# How OpenAI calls the ends of results.
FINISHES = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "repetition": "stop", "time": "length",
            "error": "stop", "cancelled": "length"}  # fmt: skip
