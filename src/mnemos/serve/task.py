"""What every protocol's request becomes before it reaches the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemos.engine.chat import Conversation


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
    session  the name of the session that it continues; a conversation's messages are the new ones then
    turns    how many turns of the session come before; if it has more by now, it is forked there
    keep     most tokens of the prompt, of which the last ones are kept; None keeps all
    names    the protocol's names of fields, by the engine's, for error messages; "prompt" is the prompt itself
    """

    prompt: str | Sequence[int] | Conversation | Infill
    fields: Mapping[str, Any] = field(default_factory=dict)
    special: bool = True
    begins: bool = True
    keep: int | None = None
    session: str | None = None
    turns: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
