"""What an answer consists of, in the order in which it arrives; each protocol writes these events in its own form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from mnemos.engine.completion import StreamedToken


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of an answer or of the reasoning before it, with the tokens that it was made of.

    sequence: the number of the result. The text may be empty: of a token that completes no character, for example.
    """

    sequence: int
    text: str
    tokens: tuple[StreamedToken, ...] = ()
    kind: Literal["text", "reasoning"] = "text"


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a tool call; `index` counts the calls of a result."""

    sequence: int
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The next part of a tool call's arguments, as JSON text."""

    sequence: int
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The end of a result: stop, length, tool_calls, repetition, time or error.

    stopped_by: the stop string or the id of the stop token that ended it. error: why, if it ended with one.
    """

    sequence: int
    reason: str
    stopped_by: str | int | None = None
    error: str | None = None


Event = Piece | CallStart | CallPiece | End


def arguments_value(text: str) -> Any:
    """A call's arguments as an object; those of a call that was cut off as the text that is there."""
    try:
        return json.loads(text)
    except ValueError:
        return {"partial_json": text}
