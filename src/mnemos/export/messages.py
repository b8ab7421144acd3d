"""What a converter's or a module's error says, in a line."""

from __future__ import annotations

import re
from pathlib import Path


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or what the one that caused it says: a converter wraps the useful one."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch."):
        error = error.__cause__
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
        place = next((frame for frame in reversed(frames) if "/torch/" not in frame[0]), None)
        where = f", in {place[2]} ({Path(place[0]).name}, line {place[1]})" if place else ""
        return f"it branches on the data{where}; express it with torch.where"
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
