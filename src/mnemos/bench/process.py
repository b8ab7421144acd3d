"""Whole processes measured from outside: time to the first token from a cold start, and peak memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass

from mnemos.errors import MnemosError

PROMPT = "The capital of France is"
RUNS = 6

# A small separate parent, because a child's peak includes the memory of the process it was forked from.
_PARENT = """
import json, resource, subprocess, sys, time
command, runs = json.loads(sys.argv[1]), int(sys.argv[2])
times = []
for _ in range(runs):
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    times.append(time.perf_counter() - start)
    if done.returncode:
        sys.exit(done.stderr.decode(errors="replace")[-2000:] or f"exit code {done.returncode}")
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([times, peak * (1 if sys.platform == "darwin" else 1024)]))
"""


@dataclass(frozen=True)
class ProcessCost:
    """seconds: median from process start to exit, page cache warm; peak_bytes: the most resident memory."""

    seconds: float
    peak_bytes: int


def measure_start(model: str, backend: str = "auto") -> ProcessCost:
    """The cost of one token with `mnemos generate`."""
    options = ["--raw", "--max-new-tokens=1", f"--backend={backend}"]
    return measure_command([sys.executable, "-m", "mnemos", "generate", model, PROMPT, *options])


def measure_command(command: list[str], runs: int = RUNS) -> ProcessCost:
    """Runs `command` `runs` times; the first run warms the page cache and is not counted."""
    parent = [sys.executable, "-c", _PARENT, json.dumps(command), str(runs)]
    done = subprocess.run(parent, capture_output=True, text=True)
    if done.returncode:
        raise MnemosError(f"cannot measure {' '.join(command)}: {done.stderr.strip()}")
    times, peak = json.loads(done.stdout)
    return ProcessCost(statistics.median(times[1:]), peak)
