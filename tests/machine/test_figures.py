"""The description of the machine."""

from __future__ import annotations

import sys

import pytest

from mnemos import _native
from mnemos.bench.process import measure_command
from mnemos.errors import MnemosError, UnsupportedError
from mnemos.machine.figures import cpu_name, multiply_rates, read_bandwidth, usable_cores


def test_the_machine_has_a_name_cores_and_bandwidth() -> None:
    assert cpu_name()
    assert usable_cores() >= 1
    assert 1e8 < read_bandwidth(10_000_000) < 1e13


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_level_multiplies_at_a_rate_for_each_of_its_forms(isa: str) -> None:
    rates = multiply_rates(isa)
    assert set(rates) == {"float32", "int8"} | ({"bfloat16"} if isa in ("avx512_bf16", "amx", "amx_bf16") else set())
    assert all(1e7 < rate < 1e15 for rate in rates.values())


def test_a_rate_of_what_a_level_does_not_multiply_is_refused() -> None:
    pool = _native.shared_pool(0)
    with pytest.raises(UnsupportedError, match="scalar kernels multiply no inputs in bfloat16"):
        _native.multiply_rate(pool, "scalar", "bfloat16", 1)
    with pytest.raises(UnsupportedError, match="no sse9 kernels"):
        _native.multiply_rate(pool, "sse9", "int8", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is measured with getrusage")
def test_a_process_is_measured_alone() -> None:
    small = measure_command([sys.executable, "-c", "pass"], runs=2)
    large = measure_command([sys.executable, "-c", "x = bytearray(50_000_000)"], runs=2)
    assert small.seconds > 0
    assert 45e6 < large.peak_bytes - small.peak_bytes < 60e6


def test_a_failing_process_is_an_error_with_its_words() -> None:
    with pytest.raises(MnemosError, match="no such model"):
        measure_command([sys.executable, "-c", "import sys; sys.exit('no such model')"])
