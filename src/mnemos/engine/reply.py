"""From streamed tokens to an answer's events: what is text, what is reasoning, what is a tool call."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from typing import Protocol

from mnemos.engine.answers import AnswerEvent, CallPiece, CallStart, End, Piece
from mnemos.engine.completion import StreamedToken
from mnemos.text.tools.exchange import Exchange
from mnemos.text.tools.fragments import CallArguments, CallName, Fragment, Reasoning, Text

_LETTERS = string.ascii_letters + string.digits


class Reply(Protocol):
    """Reads the tokens of one result."""

    def push(self, token: StreamedToken) -> list[AnswerEvent]:
        """The events that a token completes."""


class Replies:
    """Reads the tokens of all results of one request."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._replies: dict[int, Reply] = {}

    def read(self, tokens: Iterable[StreamedToken]) -> list[AnswerEvent]:
        """The events that tokens complete, in their order."""
        events: list[AnswerEvent] = []
        for token in tokens:
            reply = self._replies.get(token.sequence)
            if reply is None:
                plain = self._exchange.plain
                reply = self._replies[token.sequence] = PlainReply() if plain else ReadReply(self._exchange)
            events += reply.push(token)
        return events


class PlainReply:
    """An answer that is text throughout."""

    def push(self, token: StreamedToken) -> list[AnswerEvent]:
        piece = Piece(token.sequence, token.text, (token,))
        if token.finish_reason is None:
            return [piece]
        return [piece, End(token.sequence, token.finish_reason, token.stopped_by, token.error)]


class ReadReply:
    """An answer in which there may be reasoning and tool calls."""

    def __init__(self, exchange: Exchange) -> None:
        self._reader = exchange.reader()
        self._marks = exchange.marks
        self._short_ids = exchange.family is not None and exchange.family.short_ids
        self._tokens: list[StreamedToken] = []  # whose text is held back
        self._calls = 0

    def push(self, token: StreamedToken) -> list[AnswerEvent]:
        text = token.text
        if not text and token.token_id is not None:
            text = self._marks.get(token.token_id, "")
        self._tokens.append(token)
        events = self._events(token.sequence, self._reader.push(text))
        if token.finish_reason is None:
            return events
        events += self._events(token.sequence, self._reader.finish())
        reason = token.finish_reason
        if reason == "stop" and self._calls and not self._reader.open:
            reason = "tool_calls"
        return [*events, End(token.sequence, reason, token.stopped_by, token.error)]

    def _events(self, sequence: int, fragments: list[Fragment]) -> list[AnswerEvent]:
        events: list[AnswerEvent] = []
        for fragment in fragments:
            match fragment:
                case Text(text):
                    events.append(Piece(sequence, text, self._taken()))
                case Reasoning(text):
                    events.append(Piece(sequence, text, self._taken(), "reasoning"))
                case CallName(name):
                    self._taken()
                    events.append(CallStart(sequence, self._calls, self._new_id(), name))
                    self._calls += 1
                case CallArguments(text):
                    self._taken()
                    events.append(CallPiece(sequence, self._calls - 1, text))
        return events

    def _taken(self) -> tuple[StreamedToken, ...]:
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def _new_id(self) -> str:
        if self._short_ids:  # the templates of Mistral's models take nothing else
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
