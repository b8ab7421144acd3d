"""A model running alongside busy programs: its remaining speed, compared with its fair share of the cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnemos.bench.results import Result
from mnemos.bench.steps import StepBench
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.machine.figures import usable_cores
from mnemos.models.load import load_model

PROMPT, NEW = 512, 128  # tokens
_DEPTH = 16
_ROUNDS = 3


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Starts `count` other processes that never rest, each with one thread."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def fair_share(cores: int, others: int) -> float:
    """The share of its speed alone, with one thread per core, if all programs' threads share the cores equally."""
    return cores / (cores + others)


def measure_beside(path: Path, backend: str) -> Iterator[Result]:
    """Decoding and prompts alone, alongside one busy program, and alongside one per core.

    A result's limit is its fair share of the speed alone.
    """
    bench = StepBench(load_model(open_checkpoint(path), backend=backend), 1, PROMPT + NEW)
    cores = usable_cores()
    alone: dict[str, float] = {}
    for others in sorted({0, 1, cores}):
        with busy_programs(others):
            rates = {
                f"tg{NEW}": max(bench.decode_rate(_DEPTH, NEW) for _ in range(_ROUNDS)),
                f"pp{PROMPT}": max(bench.prompt_rate(PROMPT) for _ in range(_ROUNDS)),
            }
        alone = alone or rates
        for name, rate in rates.items():
            if others == 0:
                yield Result(name, rate, "tokens/s")
            else:
                yield Result(
                    f"{name} beside {others}", rate, "tokens/s", alone[name] * fair_share(cores, others), "fair share"
                )
