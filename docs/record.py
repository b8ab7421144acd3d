"""Records a command in a terminal and draws it as an animated SVG, in the time that it took.

    python docs/record.py docs/demo.svg -- mnemos generate smollm2-135m 'Why is the sky blue?'

The command runs in a pseudo-terminal, so it behaves as it does for a person. It understands what `mnemos` writes: text,
carriage return, line feed, "clear to the end of the line" and faint print.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLUMNS = 88
CHARACTER_WIDTH, LINE_HEIGHT, MARGIN = 8.4, 20, 16
TYPING_SECONDS, PAUSE_SECONDS = 0.03, 0.4
_PIECES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")

_STYLE = """
text { font: 14px 'DejaVu Sans Mono', ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #e6edf3; }
.faint { fill: #8b949e; }
.prompt { fill: #7ee787; }
@keyframes show { from { fill-opacity: 0 } to { fill-opacity: 1 } }
@keyframes hide { from { fill-opacity: 1 } to { fill-opacity: 0 } }
"""


@dataclass
class Run:
    """A piece of text on the screen, from second `begin` to second `end` (None: until the end)."""

    row: int
    column: int
    text: str
    style: str
    begin: float
    end: float | None = None


class Screen:
    """The screen's text. It grows downwards without limit, so nothing ever scrolls away."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.row = self.column = 0
        self.style = ""

    def write(self, text: str, when: float) -> None:
        for piece in _PIECES.findall(text):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row, self.column = self.row + 1, 0
            elif piece.startswith("\x1b"):
                self._control(piece, when)
            else:
                self._put(piece, when)

    def _control(self, code: str, when: float) -> None:
        if code.endswith("K"):
            for run in self.runs:
                if run.row == self.row and run.column >= self.column and run.end is None:
                    run.end = when
        elif code == "\x1b[2m":
            self.style = "faint"
        elif code.endswith("m"):
            self.style = ""

    def _put(self, text: str, when: float) -> None:
        while text:
            part, text = text[: COLUMNS - self.column], text[COLUMNS - self.column :]
            self.runs.append(Run(self.row, self.column, part, self.style, when))
            self.column += len(part)
            if text:
                self.row, self.column = self.row + 1, 0


def record(command: list[str]) -> list[tuple[float, str]]:
    """Runs the command; what it wrote, with the seconds since its start."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    start, pieces = time.perf_counter(), []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not data:
            break
        pieces.append((time.perf_counter() - start, decoder.decode(data)))
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"{shlex.join(command)} failed with status {status}")
    return pieces


def draw(command: list[str], pieces: list[tuple[float, str]]) -> str:
    """The SVG: the command is typed, then its output appears as it did."""
    screen = Screen()
    screen.style = "prompt"
    screen.write("$ ", 0)
    screen.style = ""
    typed = shlex.join(command)
    for index, character in enumerate(typed):
        screen.write(character, PAUSE_SECONDS + index * TYPING_SECONDS)
    begin = 2 * PAUSE_SECONDS + len(typed) * TYPING_SECONDS
    screen.write("\r\n", begin)
    for when, text in pieces:
        screen.write(text, begin + when)
    width = COLUMNS * CHARACTER_WIDTH + 2 * MARGIN
    height = (max(run.row for run in screen.runs) + 1) * LINE_HEIGHT + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
        f"<style>{_STYLE}</style>",
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
        *_lines(screen.runs),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _lines(runs: list[Run]) -> list[str]:
    """One text element per row of lasting text, so that any font spaces it well, and one per run that disappears."""
    rows: dict[tuple[int, int], list[Run]] = {}
    for index, run in enumerate(runs):
        rows.setdefault((run.row, -1 if run.end is None else index), []).append(run)
    return [_line(row, parts) for (row, _), parts in sorted(rows.items())]


def _line(row: int, parts: list[Run]) -> str:
    x, y = MARGIN + parts[0].column * CHARACTER_WIDTH, MARGIN + row * LINE_HEIGHT + 14
    spans = "".join(_span(run) for run in parts)
    return f'<text x="{x:.1f}" y="{y}" xml:space="preserve">{spans}</text>'


def _span(run: Run) -> str:
    # Where animations are not played, the text is simply shown, except what the terminal cleared.
    animation = f"animation:show 1ms {run.begin:.2f}s both"
    if run.end is not None:
        animation += f",hide 1ms {run.end:.2f}s forwards;fill-opacity:0"
    kind = f' class="{run.style}"' if run.style else ""
    return f'<tspan{kind} style="{animation}">{escape(run.text)}</tspan>'


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        raise SystemExit(__doc__)
    command = sys.argv[3:]
    Path(sys.argv[1]).write_text(draw(command, record(command)), encoding="utf-8")


if __name__ == "__main__":
    main()
