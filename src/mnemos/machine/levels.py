"""Which instruction set each class of operators runs with: the one that was fastest when this machine was measured.

Processors with the same features differ in what their units are good at. So the best levels are timed once, in tens of
milliseconds, and the choice is kept in Mnemos's folder with a fingerprint of the machine and the kernels; machines and
installations that share the folder have a file each. It stays the same within a process, so that results do, too.
`MNEMOS_ISA` overrides it.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mnemos.errors import ConfigError
from mnemos.machine.home import home
from mnemos.native import require_core

OPERATORS = ("quantized", "floats", "attention")
"""Products with quantized weights; with weights in float32, float16 or bfloat16; attention and everything else."""

_CANDIDATES = 3  # levels: one that is so much lower than the best never wins
_ON_REQUEST = ("amx_bf16",)  # faster for prompts and many sequences, slower for one: the trials do not say what matters
_CLEARLY = 0.95  # of the likely best's seconds: below that another level is faster, rather than luckier
_FORMAT = 1
_MODEL = ("vendor_id", "cpu family", "model", "model name", "stepping")
_ARM_MODEL = ("CPU implementer", "CPU variant", "CPU part", "CPU revision")

Trial = Callable[[str, str], float]


@dataclass(frozen=True)
class Choice:
    """levels: by operators; seconds: what the trials of each level took, by operators, then by level."""

    fingerprint: str
    levels: Mapping[str, str]
    seconds: Mapping[str, Mapping[str, float]]


def levels_in_use() -> dict[str, str]:
    """The instruction set of each class of operators, for what is made from now on."""
    settle_levels()
    core = require_core()
    return {operators: str(core.isa(operators)) for operators in OPERATORS}


def describe_levels(levels: Mapping[str, str]) -> str:
    """One name where all have the same level, else each."""
    if len(set(levels.values())) == 1:
        return next(iter(levels.values()))
    return ", ".join(f"{level} for {operators}" for operators, level in levels.items())


@cache
def settle_levels() -> Choice | None:
    """Once a process: has the native core prefer the levels that are fastest here, measured now or before.

    None where MNEMOS_ISA names a level for all of them, and where there is one level alone. A folder that cannot be
    written only means that the next process measures again.
    """
    core = require_core()
    named = os.environ.get("MNEMOS_ISA", "")
    if (named and "=" not in named) or len(core.available_isas()) == 1:
        return None
    fingerprint = machine_fingerprint()
    try:
        path = choice_path(fingerprint)
    except ConfigError:  # a user without a home folder
        path = None
    choice = None if path is None else read_choice(path)
    if choice is None or choice.fingerprint != fingerprint:
        choice = measure_levels(fingerprint, core.trial_seconds)
        if path is not None:
            with suppress(OSError):
                write_choice(path, choice)
    core.prefer_isas(",".join(f"{operators}={level}" for operators, level in choice.levels.items()))
    return choice


def measure_levels(fingerprint: str, trial: Trial) -> Choice:
    """Tries the best levels. The likely best stays unless another is clearly faster: noise harms little then."""
    core = require_core()
    levels, seconds = {}, {}
    for operators in OPERATORS:
        likely = str(core.likely_isa(operators))
        chosen_from = [level for level in core.available_isas() if level not in _ON_REQUEST]
        candidates = {*chosen_from[-_CANDIDATES:], likely}
        seconds[operators] = {level: trial(operators, level) for level in sorted(candidates)}
        fastest = min(candidates, key=lambda level, times=seconds[operators]: times[level])  # type: ignore[misc]
        clear = seconds[operators][fastest] < _CLEARLY * seconds[operators][likely]
        levels[operators] = fastest if clear else likely
    return Choice(fingerprint, levels, seconds)


def machine_fingerprint() -> str:
    """What a measurement holds for: this processor with these levels, and these kernels."""
    core = require_core()
    built = Path(str(core.__file__)).stat()
    parts = (_FORMAT, cpu_model(), "+".join(core.available_isas()), built.st_size, built.st_mtime_ns)
    return "; ".join(str(part) for part in parts)


def choice_path(fingerprint: str) -> Path:
    """Where the choice for a fingerprint is kept."""
    return home() / "levels" / f"{zlib.crc32(fingerprint.encode()):08x}.json"


def read_choice(path: Path) -> Choice | None:
    """None if there is no file, or none that this version understands in whole."""
    core = require_core()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        levels = {operators: str(values["levels"][operators]) for operators in OPERATORS}
        seconds = {
            operators: {str(level): float(time) for level, time in values["seconds"][operators].items()}
            for operators in OPERATORS
        }
        choice = Choice(str(values["fingerprint"]), levels, seconds)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return choice if set(levels.values()) <= set(core.available_isas()) else None


def write_choice(path: Path, choice: Choice) -> None:
    """Whole or not at all, whoever else writes it."""
    import tempfile  # not needed in most processes

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, written = tempfile.mkstemp(dir=path.parent, prefix=".levels")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(choice), file, indent=1)
        os.replace(written, path)
    except OSError:
        os.unlink(written)
        raise


@cache
def cpu_name() -> str:
    """As the operating system gives it."""
    try:
        return _cpu_fields("/proc/cpuinfo").get("model name") or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def cpu_model(path: str = "/proc/cpuinfo") -> str:
    """The processor, told apart from others of its name: virtual machines call several models by the same.

    path: where Linux describes it; elsewhere the name is all.
    """
    try:
        fields = _cpu_fields(path)
    except OSError:
        return cpu_name()
    return ", ".join(fields[name] for name in (*_MODEL, *_ARM_MODEL) if name in fields) or platform.machine()


def _cpu_fields(path: str) -> dict[str, str]:
    """What Linux says of the first processor."""
    fields: dict[str, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                break
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    return fields
