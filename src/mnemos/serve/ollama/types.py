"""Ollama's requests, and what they mean in the engine's fields."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mnemos.errors import shown
from mnemos.serve.body import Body
from mnemos.serve.catalogue import FOREVER
from mnemos.serve.refusal import Refusal

# Options by Ollama's names and by the engine's.
OPTIONS = {
    "num_predict": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_last_n",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}
# These are decided when the server starts.
RUNNING = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "use_mmap", "use_mlock", "numa",
           "low_vram", "f16_kv", "vocab_only", "penalize_newline", "tfs_z", "draft_num_predict")  # fmt: skip
LONGEST = 1e9  # seconds of keep_alive: more is the same
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class NamedRequest(Body):
    """A request about one model."""

    model: str | None = None
    name: str | None = None  # an older name of the same field

    @property
    def wanted(self) -> str | None:
        """The model's name."""
        return self.model or self.name


class GenerationRequest(NamedRequest):
    """What `/api/chat` and `/api/generate` share."""

    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | int | float | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=100)


class ChatRequest(GenerationRequest):
    """`POST /api/chat`."""

    messages: list[dict[str, Any]] | None = Field(default=None, max_length=10_000)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=512)


class GenerateRequest(GenerationRequest):
    """`POST /api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedRequest(NamedRequest):
    """`POST /api/embed`, and with `prompt` the older `/api/embeddings`."""

    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | int | float | None = None


def fields_of(body: GenerationRequest) -> dict[str, Any]:
    """The engine's fields. Refusal for options that Ollama does not know."""
    fields: dict[str, Any] = {}
    for name, value in (body.options or {}).items():
        if value is None or name in RUNNING:
            continue
        if name not in OPTIONS:
            raise Refusal(
                400, f"options.{name[:80]} is not an option; the options are {', '.join(OPTIONS)}", param="options"
            )
        fields[OPTIONS[name]] = value
    if isinstance(limit := fields.get("max_new_tokens"), int) and limit < 0:  # until the text or the context ends
        del fields["max_new_tokens"]
    if fields.get("penalty_last_n") == 0:  # penalties are off
        fields = {key: value for key, value in fields.items() if key not in ("penalty_last_n", "repetition_penalty")}
    if isinstance(seed := fields.get("seed"), int) and seed < 0:
        del fields["seed"]
    if body.format == "json":
        fields["json_schema"] = True
    elif isinstance(body.format, dict):
        fields["json_schema"] = body.format
    elif body.format:
        raise Refusal(400, f"format is {shown(body.format)}; it must be 'json' or a JSON schema", param="format")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return fields


def names_of() -> dict[str, str]:
    """The protocol's names of the engine's fields, for error messages."""
    renamed = {field: f"options.{name}" for name, field in OPTIONS.items()}
    return {**renamed, "json_schema": "format", "logprobs": "top_logprobs"}


def seconds_of(keep_alive: str | int | float | None) -> float | None:
    """`keep_alive` in seconds; below zero it means for ever. None if it is not given."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", keep_alive.lstrip("-"))
        whole = "".join(number + unit for number, unit in parts)
        plain = re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", keep_alive)
        if not plain and (not parts or whole != keep_alive.lstrip("-") or len(keep_alive) > 64):
            raise Refusal(
                400, f"keep_alive is {shown(keep_alive)}; it must be seconds, or a time like 5m", param="keep_alive"
            )
        seconds = float(keep_alive) if plain else sum(float(number) * _UNITS[unit] for number, unit in parts)
        negative = keep_alive.startswith("-")
    else:
        seconds, negative = float(min(keep_alive, LONGEST)), keep_alive < 0
    return FOREVER if negative else seconds


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ollama's messages in the form that chat templates take."""
    found = []
    for index, message in enumerate(messages):
        if message.get("images"):
            raise Refusal(400, f"messages[{index}].images: this server's models read text only", param="messages")
        own = {key: value for key, value in message.items() if key not in ("images", "tool_name")}
        if isinstance(message.get("tool_name"), str):
            own["name"] = message["tool_name"]
        found.append(own)
    return found


def thinking_of(think: bool | str | None) -> tuple[bool | None, Mapping[str, Any]]:
    """Whether the model reasons first, and variables of its template that say how much."""
    if isinstance(think, str):
        return True, {"reasoning_effort": think}
    return think, {}
