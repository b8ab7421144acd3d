"""What an answer consists of: events in the order in which they arrive, and the finished answers made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mnemos.engine.completion import Choice, StreamedToken


class Piece(NamedTuple):
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


AnswerEvent = Piece | CallStart | CallPiece | End


@dataclass(frozen=True)
class Call:
    """A tool call of a finished answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    @property
    def parsed_arguments(self) -> Any:
        """The arguments as an object; those of a call that was cut off as `{"partial_json": TEXT}`."""
        return arguments_value(self.arguments)


@dataclass(frozen=True)
class Answer:
    """One finished answer: its text, the reasoning before it, its calls, why it ended, and its tokens.

    tokens            of the text
    reasoning_tokens  the number of tokens of the reasoning
    token_ids         all, with those of reasoning, calls and the end
    """

    text: str
    reasoning: str
    calls: tuple[Call, ...]
    end: End
    tokens: tuple[StreamedToken, ...] = field(repr=False)
    reasoning_tokens: int
    token_ids: Sequence[int] = field(repr=False)

    @property
    def finish_reason(self) -> str:
        """stop, length, tool_calls, repetition, time, error or cancelled."""
        return self.end.reason

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the assistant, which continues the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


def arguments_value(text: str) -> Any:
    """A call's arguments as an object; those of a call that was cut off as the text that is there."""
    try:
        return json.loads(text)
    except ValueError:
        return {"partial_json": text}


def answers_of(events: Iterable[AnswerEvent], choices: Iterable[Choice]) -> list[Answer]:
    """Finished answers from all their events, in the order of their numbers. choices: the same results as tokens."""
    token_ids = {choice.index: choice.token_ids for choice in choices}
    by_sequence: dict[int, list[AnswerEvent]] = {}
    for event in events:
        by_sequence.setdefault(event.sequence, []).append(event)
    return [_answer(sequence, by_sequence[sequence], token_ids.get(sequence, ())) for sequence in sorted(by_sequence)]


def _answer(sequence: int, events: list[AnswerEvent], token_ids: Sequence[int]) -> Answer:
    texts = [event for event in events if isinstance(event, Piece) and event.kind == "text"]
    thoughts = [event for event in events if isinstance(event, Piece) and event.kind == "reasoning"]
    arguments = [event for event in events if isinstance(event, CallPiece)]
    return Answer(
        "".join(piece.text for piece in texts),
        "".join(piece.text for piece in thoughts),
        tuple(
            Call(call.id, call.name, "".join(part.text for part in arguments if part.index == call.index))
            for call in events
            if isinstance(call, CallStart)
        ),
        next((event for event in events if isinstance(event, End)), End(sequence, "cancelled")),
        tuple(token for piece in texts for token in piece.tokens),
        sum(len(piece.tokens) for piece in thoughts),
        token_ids,
    )
