"""Shows a text as it is generated, and its speed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

from mnemos.cli.terminal import dim

if TYPE_CHECKING:
    from mnemos.engine.answers import AnswerEvent
    from mnemos.engine.completion import StreamedToken

_AT_ONCE = 1e-4  # seconds a token: no model generates as fast as that


class StreamView:
    """Writes a stream's pieces to standard output and keeps the shown text, even when interrupted."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self._began = perf_counter()
        self._first = 0.0
        self._last = 0.0

    def show(self, stream: Iterator[StreamedToken]) -> None:
        for token in stream:
            if token.token_id is not None:
                self._last = perf_counter()
                self._first = self._first or self._last
                self.tokens += 1
            self.text += token.text
            sys.stdout.write(token.text)
            sys.stdout.flush()

    def show_answer(self, events: Iterator[AnswerEvent]) -> None:
        """Shows an answer; reasoning is dim, and no part of the kept text."""
        from mnemos.engine.answers import Piece  # not needed for a stream of tokens

        for event in events:
            if not isinstance(event, Piece):
                continue
            if any(token.token_id is not None for token in event.tokens):
                self._last = perf_counter()
                self._first = self._first or self._last
                self.tokens += sum(token.token_id is not None for token in event.tokens)
            thought = event.kind == "reasoning"
            self.text += "" if thought else event.text
            sys.stdout.write(dim(event.text, sys.stdout) if thought and event.text else event.text)
            sys.stdout.flush()

    @property
    def summary(self) -> str:
        """`48 tokens, 213 tokens/s, first after 0.06 s`; the rate covers the tokens after the first.

        Beams deliver their tokens together, in the end: `48 tokens after 0.32 s`.
        """
        if not self.tokens:
            return "no tokens"
        parts = [f"{self.tokens} token{'s' if self.tokens > 1 else ''}"]
        if self.tokens > 1 and self._last - self._first < _AT_ONCE * self.tokens:
            return f"{parts[0]} after {self._last - self._began:.2f} s"
        if self.tokens > 1:
            parts.append(f"{(self.tokens - 1) / (self._last - self._first):.0f} tokens/s")
        parts.append(f"first after {self._first - self._began:.2f} s")
        return ", ".join(parts)
