"""Shows a text as it is generated, and its speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mnemos.cli.terminal import dim

if TYPE_CHECKING:
    from mnemos.engine.answers import AnswerEvent
    from mnemos.engine.completion import StreamedToken


class StreamView:
    """Writes a stream's pieces to standard output and keeps the shown text, even when interrupted."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self._began = time.perf_counter()
        self._first = 0.0
        self._last = 0.0

    def show(self, stream: Iterator[StreamedToken]) -> None:
        for token in stream:
            if token.token_id is not None:
                self._last = time.perf_counter()
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
                self._last = time.perf_counter()
                self._first = self._first or self._last
                self.tokens += sum(token.token_id is not None for token in event.tokens)
            thought = event.kind == "reasoning"
            self.text += "" if thought else event.text
            sys.stdout.write(dim(event.text, sys.stdout) if thought and event.text else event.text)
            sys.stdout.flush()

    @property
    def summary(self) -> str:
        """`48 tokens, 213 tokens/s, first after 0.06 s`; the rate covers the tokens after the first."""
        if not self.tokens:
            return "no tokens"
        parts = [f"{self.tokens} token{'s' if self.tokens > 1 else ''}"]
        if self.tokens > 1 and self._last > self._first:
            parts.append(f"{(self.tokens - 1) / (self._last - self._first):.0f} tokens/s")
        parts.append(f"first after {self._first - self._began:.2f} s")
        return ", ".join(parts)
