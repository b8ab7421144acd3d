"""From streamed tokens to an answer's events: what is text, what is reasoning, what is a tool call."""

from __future__ import annotations

from typing import Protocol

from mnemos.engine.completion import StreamedToken
from mnemos.serve.events import End, Event, Piece


class Reply(Protocol):
    """Reads the tokens of one result."""

    def push(self, token: StreamedToken) -> list[Event]:
        """The events that a token completes."""


class PlainReply:
    """An answer that is text throughout."""

    def push(self, token: StreamedToken) -> list[Event]:
        events: list[Event] = [Piece(token.sequence, token.text, (token,))]
        if token.finish_reason is not None:
            events.append(End(token.sequence, token.finish_reason, token.stopped_by, token.error))
        return events
