"""Terminal output, narrow or wide, and what a file gets instead."""

from __future__ import annotations

import io
import os
import re

import pytest

from mnemos.cli.terminal import ProgressBar, dim, human_bytes, human_count


class Screen(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return [line for line in self.getvalue().split("\r\x1b[K") if line]


def bar(stream: io.StringIO, columns: int, monkeypatch: pytest.MonkeyPatch) -> ProgressBar:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setenv("TERM", "xterm")
    return ProgressBar("smollm2-135m", stream=stream)


@pytest.mark.parametrize("columns", [2, 10, 20, 40, 80, 200])
def test_a_bar_never_wraps_and_ends_cleared(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    with bar(screen, columns, monkeypatch) as progress:
        for done in range(0, 101, 10):
            progress("downloading", done * 1_000_000, 100_000_000)
    assert screen.lines and all(len(line) < columns for line in screen.lines)
    assert screen.getvalue().endswith("\r\x1b[K")


def test_a_wide_bar_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    progress = bar(screen, 100, monkeypatch)
    progress.note = "perplexity 20.1"
    progress("downloading", 46_000_000, 92_000_000)
    expected = "smollm2-135m: downloading  50% [" + "=" * 15 + " " * 15 + "] 46 MB of 92 MB perplexity 20.1"
    assert screen.lines == [expected]


def test_without_a_terminal_each_stage_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with bar(file, 80, monkeypatch) as progress:
        for done in range(100):
            progress("downloading", done, 100)
        progress("unpacking", 1, 5_000_000)
        progress("waiting", 0, 0)
    assert file.getvalue().splitlines() == [
        "smollm2-135m: downloading (100 B)",
        "smollm2-135m: unpacking (5 MB)",
        "smollm2-135m: waiting",
    ]


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert re.fullmatch(r"\x1b\[2mquiet\x1b\[0m", dim("quiet", Screen()))
    assert dim("quiet", io.StringIO()) == "quiet"
    monkeypatch.setenv("NO_COLOR", "1")
    assert dim("quiet", Screen()) == "quiet"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert dim("quiet", Screen()) == "quiet"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (141_312, "141 kB"), (4.7e9, "4.7 GB"), (2.5e12, "2500 GB")],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(134_515_008, "135M"), (8_030_261_248, "8.03B"), (12, "12")])
def test_counts_are_short(count: float, text: str) -> None:
    assert human_count(count) == text
