"""What every protocol's request becomes before it reaches the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may, must or must not be tool calls. `name`: the one tool that must be called."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages to answer, in the form that `mnemos.text.conversation` takes.

    tools      function tools: {"type": "function", "function": {"name", "description", "parameters"}}
    parallel   several calls may be made in one answer
    continues  the last message is the assistant's, and the answer continues it
    thinking   whether the model reasons first; None leaves it to the template
    budget     most tokens of reasoning, or None
    template   further variables for the chat template
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = ToolChoice()
    parallel: bool = True
    continues: bool = False
    thinking: bool | None = None
    budget: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Infill:
    """Two texts between which the answer is written."""

    prefix: str
    suffix: str


@dataclass(frozen=True)
class Task:
    """One prompt and how to continue it.

    prompt   a text, token ids, a conversation, or two texts to write between
    fields   of GenerationConfig, not yet checked
    special  names of special tokens in a text prompt mean those tokens
    begins   a text prompt gets the tokens that the model expects around a text
    keep     most tokens of the prompt, of which the last ones are kept; None keeps all
    names    the protocol's names of fields, by the engine's, for error messages; "prompt" is the prompt itself
    """

    prompt: str | Sequence[int] | Conversation | Infill
    fields: Mapping[str, Any] = field(default_factory=dict)
    special: bool = True
    begins: bool = True
    keep: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
