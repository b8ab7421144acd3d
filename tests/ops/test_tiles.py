"""The AMX kernels against those of AVX-512, on processors without AMX too: its instructions are emulated there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[2] / "native" / "linear" / "tests" / "run.sh"
SKIPPED = 77


@pytest.mark.slow
@pytest.mark.timeout(900)  # most of it compiles the kernels: a minute where nothing else runs
@pytest.mark.skipif(os.name != "posix" or os.uname().machine != "x86_64", reason="AMX belongs to x86-64")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_amx_tiles_give_the_bits_of_avx512() -> None:
    """Every quantized type, both forms of activations, 1 to 40 rows, whole and partly empty panels."""
    done = subprocess.run([CHECKS, "amx"], capture_output=True, text=True)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
