"""The AMX kernels against those of AVX-512 and Intel's manual; processors without AMX have it emulated."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "build" / "tests" / "native" / "check_amx"
SKIPPED = 77


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.uname().machine != "x86_64", reason="AMX belongs to x86-64")
@pytest.mark.skipif(not PROGRAM.exists(), reason="the program is not built: make native-tests")
def test_amx_tiles_give_the_right_bits() -> None:
    """Whole and partly empty panels, each row alone and among others.

    Every quantized type, both forms of activations, 1 to 40 rows, has the bits of AVX-512; bfloat16, 1 to 70 rows, has
    those of the steps that the manual defines, and they are near the sums in float64.
    """
    done = subprocess.run([PROGRAM], capture_output=True, text=True)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
