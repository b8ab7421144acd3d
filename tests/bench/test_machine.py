"""What is said about the machine."""

from __future__ import annotations

import sys

import pytest

from mnemos.bench.machine import cpu_name, read_bandwidth, usable_cores
from mnemos.bench.process import measure_command
from mnemos.errors import MnemosError


def test_the_machine_has_a_name_cores_and_bandwidth() -> None:
    assert cpu_name()
    assert usable_cores() >= 1
    assert 1e8 < read_bandwidth(10_000_000) < 1e13


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is measured with getrusage")
def test_a_process_is_measured_alone() -> None:
    small = measure_command([sys.executable, "-c", "pass"], runs=2)
    large = measure_command([sys.executable, "-c", "x = bytearray(50_000_000)"], runs=2)
    assert small.seconds > 0
    assert 45e6 < large.peak_bytes - small.peak_bytes < 60e6


def test_a_failing_process_is_an_error_with_its_words() -> None:
    with pytest.raises(MnemosError, match="no such model"):
        measure_command([sys.executable, "-c", "import sys; sys.exit('no such model')"])
