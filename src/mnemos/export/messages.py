"""What a converter's or a module's error says, in a line."""

from __future__ import annotations

import re
from pathlib import Path

from mnemos.errors import MnemosError

BY_TRACING = "written by tracing: whatever depends on the data was compared, not proved"
GOES_ANOTHER_WAY = "its code goes another way at some sizes"


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or what the one that caused it says: a converter wraps the useful one."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch."):
        error = error.__cause__
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        place = place_in(text)
        return f"it branches on the data{place and f', {place}'}; express it with torch.where"
    if len(lines) > 1 and "failed in the TorchScript interpreter" in lines[0]:
        return lines[-1][:300]  # the error itself, below the code around it
    stated = _STATUS.search(str(error))
    if stated:
        return f"{stated['node']} fails: {stated['problem'].strip()[:300]}"
    if lines and _PLACE.search(lines[0]):  # OpenVINO's places in its source, and then the problem
        return f"{type(error).__name__}: {next((each for each in lines if not _PLACE.search(each)), lines[-1])[:300]}"
    guard = _GUARD.search(text)
    if guard:
        condition = _SIZE.sub(r"size \2 of input \1", guard["condition"])
        return f"{GOES_ANOTHER_WAY}, and what was exported is for {condition} (counted from 0)"
    fixed = _FIXED.search(text)
    if fixed:
        axis, size = (fixed["axis"], fixed["size"]) if fixed["axis"] else (fixed["at"], fixed["of"])
        return (
            f"its code fixes size {axis} of an input (counted from 0) at {size}, as a loop over that axis or a "
            "recurrent layer does; leave the axis out of dynamic_axes, or script the module (TorchScriptExporter)"
        )
    if isinstance(error, MnemosError):
        return text
    found = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    source = _SOURCE.search(text)  # of a script that does not compile
    return f"{found.rstrip(' :.')} ({Path(source['file']).name}, line {source['line']})" if source else found


def place_in(text: str) -> str:
    """The innermost function outside PyTorch that a stack names, as `in NAME (FILE, line N)`; empty: it names none."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    frames = frames or re.findall(r"Caused by: \((\S+):(\d+) in (\w+)\)", text)
    place = next((frame for frame in reversed(frames) if "/torch/" not in frame[0]), None)
    return f"in {place[2]} ({Path(place[0]).name}, line {place[1]})" if place else ""


_SOURCE = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)\n', re.MULTILINE)
_FIXED = re.compile(
    r"size\(\)\[(?P<axis>\d+)\] as dynamic but your code specialized it .* constant \((?P<size>\d+)\)"
    r"|static shape of (?P<of>\d+) for dimension \S+\.shape\[(?P<at>\d+)\]"
)
_GUARD = re.compile(r"Guard failed: (?P<condition>.+)")
_SIZE = re.compile(r"tensors_(\d+)\.size\(\)\[(\d+)\]")
_COLOURS = re.compile(r"\x1b?\[[0-9;]*m")
_STATUS = re.compile(r"while running (?P<node>\w+) node.* Status Message: (?P<problem>[^\n\x1b]+)")
_PLACE = re.compile(r"^(Exception from|Check '.*' failed at|FrontEnd API failed)|\.[ch]pp:\d+:?$")
