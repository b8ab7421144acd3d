"""The kernels that `mnemos bench --ops` times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mnemos._native")

from mnemos.bench import kernels
from mnemos.ops.native import NativeOps


@pytest.mark.parametrize("chapters", [0, 5])
def test_memory_attention_reads_what_it_counts(chapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 3 heads, 64 columns and 16 bits each, for 4 chapters where there are any, in 8 layers."""
    monkeypatch.setattr(kernels, "_CONTEXT", 64)
    limits = SimpleNamespace(rates={"bfloat16": 1e12, "float32": 1e12}, bandwidth=1e10)
    machine: Any = SimpleNamespace(limits=limits)
    (result,) = kernels._measure_memory(NativeOps(), (1,), machine, chapters)
    read = 64 * (4 if chapters else 1)
    assert result.bytes == 8 * read * 2 * 3 * 64 * 2
    assert result.operations == 4 * 8 * 9 * 64 * read and result.seconds > 0
