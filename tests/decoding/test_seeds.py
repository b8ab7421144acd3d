"""Counter-based random numbers: known answers, uniform, and the native core's equal to the reference."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos import native
from mnemos.decoding.seeds import philox, stream_seed, uniform, uniform_python


def test_philox_gives_the_published_answers():
    assert philox(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox(2**64 - 1, 2**128 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    counter = 0x03707344_13198A2E_85A308D3_243F6A88
    assert philox(0x299F31D0_A4093822, counter) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_random_numbers_are_uniform_and_depend_on_all_their_arguments():
    numbers = np.array([uniform(5, position) for position in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # the 0.1% quantile for 19 degrees of freedom
    assert len({uniform(s, p, d) for s in (1, 2**63) for p in (0, 2**40) for d in (0, 1)}) == 8
    assert stream_seed(9, 0) == 9
    assert len({stream_seed(9, i) for i in range(100)}) == 100


def test_native_numbers_are_the_references():
    if native.core is None:
        pytest.skip("the native core is not built")
    for seed, position, draw in ((0, 0, 0), (2**63 + 5, 77, 3), (2**64 - 1, 2**40, 1)):
        assert uniform(seed, position, draw) == uniform_python(seed, position, draw)
