"""Terminal output: progress bars, quiet remarks, human-readable sizes."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

from mnemos.errors import MnemosError

_REDRAW_SECONDS = 0.1
_CLEAR = "\r\x1b[K"


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can move the cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    """`text` in faint print where `stream` can show it (https://no-color.org is respected)."""
    return f"\x1b[2m{text}\x1b[0m" if is_terminal(stream) and not os.environ.get("NO_COLOR") else text


def remark(text: str) -> None:
    """Prints a quiet line beside the actual output."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """What is wrong, in one line for a terminal; an error that Mnemos does not raise on purpose is marked as such."""
    text = " ".join(str(error).split())
    if isinstance(error, MnemosError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"unexpected {type(error).__name__}: {text} (--debug shows the traceback)"


def human_bytes(count: float) -> str:
    """Decimal units: 98.4 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{_rounded(count)} {unit}"
        count /= 1000
    return f"{_rounded(count)} GB"


def human_count(count: float) -> str:
    """135M, 8.03B."""
    for unit in ("", "K", "M"):
        if count < 1000:
            return f"{_rounded(count)}{unit}"
        count /= 1000
    return f"{_rounded(count)}B"


def _rounded(count: float) -> str:
    return f"{count:.3g}" if count < 100 else f"{count:.0f}"


class ProgressBar:
    """A bar on standard error, redrawn in place; without a terminal, one line per stage.

    Called as progress(stage, done, total); total 0 means unknown. `unit` is "B" for bytes or a noun; `note` is
    shown at the end of the line.
    """

    def __init__(self, label: str, unit: str = "B", stream: TextIO | None = None) -> None:
        self.label = label
        self.unit = unit
        self.stream = stream or sys.stderr
        self.live = is_terminal(self.stream)
        self.stage = ""
        self.note = ""
        self.drawn_at = 0.0
        self.stage_began = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.stage_began, self.drawn_at = stage, now, 0.0
            if not self.live:
                size = f" ({self._amount(total)})" if total else ""
                print(f"{self.label}: {stage}{size}", file=self.stream, flush=True)
        if self.live and (now - self.drawn_at >= _REDRAW_SECONDS or done >= total):
            self.drawn_at = now
            self.stream.write(_CLEAR + self._line(done, total, now - self.stage_began))
            self.stream.flush()

    def close(self) -> None:
        if self.live and self.stage:
            self.stream.write(_CLEAR)
            self.stream.flush()

    def _line(self, done: int, total: int, seconds: float) -> str:
        """The longest form that fits: label, stage, bar, percentage, amounts, rate; the last is dropped first."""
        from shutil import get_terminal_size  # slow to import, and a bar is seldom drawn

        width = get_terminal_size().columns - 1
        line = f"{self.label}: {self.stage}"
        if not total:
            return line[:width]
        line += f" {100 * min(done, total) // total:3d}%"
        bar_width = min(30, width - len(line) - 3)
        if bar_width >= 8:
            filled = bar_width * min(done, total) // total
            line += f" [{'=' * filled}{' ' * (bar_width - filled)}]"
        for part in (f" {self._amount(done)} of {self._amount(total)}", self._rate(done, seconds), f" {self.note}"):
            if len(line) + len(part) <= width:
                line += part
        return line[:width]

    def _amount(self, count: int) -> str:
        return human_bytes(count) if self.unit == "B" else f"{count} {self.unit}"

    def _rate(self, done: int, seconds: float) -> str:
        if seconds < 0.5 or not done:
            return ""
        rate = done / seconds
        return f", {human_bytes(rate)}/s" if self.unit == "B" else f", {rate:.0f} {self.unit}/s"
