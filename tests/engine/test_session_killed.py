"""A session outlives its process: killed at any moment, it is what was ended, and goes on with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_folder import session_path
from tests.engine.toys import ToyModel, toy_greedy

ROOT = Path(__file__).parents[2]


def run_and_kill(folder: Path, seed: int, seconds: float) -> list[tuple[str, list[int]]]:
    """What the process has reported, which is killed `seconds` after its first report."""
    command = [sys.executable, "-m", "tests.engine.killed_session", str(folder), str(seed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    lines = [first, *process.stdout.readlines()]
    process.wait()
    process.stdout.close()
    parts = [line.split() for line in lines if line.endswith("\n")]
    return [(word, [int(token) for token in tokens]) for word, *tokens in parts]


def check(folder: Path, before: list[int], reports: list[tuple[str, list[int]]]) -> list[int]:
    """The session's tokens after a kill: those reported last, or after one turn more, or before one that was undone."""
    (_, opened), (word, last) = reports[0], reports[-1]
    assert opened == before
    with InferenceEngine(ToyModel(context_length=4096), cache_tokens=40_000, session_dir=folder) as engine:
        session = engine.session("notes")
        tokens = session.tokens
        if word == "rewinding":
            assert tokens in (last, reports[-2][1])
        elif tokens != last:
            assert tokens[: len(last)] == last and len(set(tokens[len(last) : len(last) + 9])) == 1
        said = session.submit([5], max_new_tokens=2).result()
        assert said.token_ids == toy_greedy([*tokens, 5], 2)
        assert said.usage.cached_tokens >= len(tokens) - 8  # its pages are those of its tokens
        session.rewind()
    return tokens


def kill_often(folder: Path, times: int) -> None:
    """Kills a process that continues what the one before has left, after up to 0.12 s of work."""
    chance, tokens = random.Random(times), list[int]()
    for seed in range(times):
        tokens = check(folder, tokens, run_and_kill(folder, seed, chance.uniform(0, 0.12)))
        if len(tokens) > 400:
            with InferenceEngine(ToyModel(context_length=4096), session_dir=folder) as engine:
                engine.session("notes").forget()
            tokens = []


def test_killed_at_random(tmp_path: Path) -> None:
    kill_often(tmp_path, 6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_for_long(tmp_path: Path) -> None:
    kill_often(tmp_path, 60)


def test_a_reopened_file_continues_where_writing_stopped(tmp_path: Path) -> None:
    """Every length at which a kill may have left the file."""
    with InferenceEngine(ToyModel(), cache_tokens=4000, session_dir=tmp_path) as engine:
        session = engine.session("notes")
        session.generate([3] * 9, max_new_tokens=3)
        first, size = session.tokens, session.size
        session.generate([4] * 9, max_new_tokens=3)
        second = session.tokens
        binding = session._file.binding
    path = session_path(tmp_path, "notes")
    whole = path.read_bytes()
    for end in range(size, len(whole) + 1, 7):
        path.write_bytes(whole[:end])
        file = SessionFile(path, binding, "notes")
        assert file.tokens == (second if end == len(whole) else first)
        file.close()
