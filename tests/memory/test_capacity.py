"""The number of pages follows from the memory that the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from mnemos.contract import KVLayout, ModelSpec
from mnemos.errors import CapacityError
from mnemos.memory import capacity
from mnemos.memory.capacity import DEFAULT_TOKENS, cache_bytes, plan_pages, text_pages

LIMIT = 2 << 30
SPEC = ModelSpec("any", 100, 2048, 64, KVLayout(layers=30, kv_heads=8, head_dim=64))


def limited(code: str) -> str:
    """The output of a program that may map LIMIT bytes."""
    start = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))\n"
    program = [sys.executable, "-c", start + textwrap.dedent(code)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # each of NumPy's threads maps some, too
    return subprocess.run(program, capture_output=True, text=True, check=True, env=environment).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say what is mapped")
def test_a_limit_of_the_address_space_counts() -> None:
    """As `ulimit -v` sets it: a plan and a model that ignore it fail in the middle of loading."""
    pages = limited("""
        from tests.memory.test_capacity import SPEC
        from mnemos.memory.capacity import plan_pages
        print(*plan_pages(SPEC, None))
    """)
    assert 0 < int(pages) * SPEC.layout.page_bytes <= LIMIT // 4
    message = limited("""
        from mnemos.errors import CapacityError
        from mnemos.machine.memory import check_memory
        check_memory(1_000_000, "a small model")
        try:
            check_memory(2_200_000_000, "a large model")
        except CapacityError as error:
            print(error)
    """)
    assert message.startswith("a large model needs 2200 MB") and message.endswith("are missing")


def test_a_cache_beyond_the_machine_is_refused() -> None:
    with pytest.raises(CapacityError, match="cache_tokens is 1000000000000000"):
        plan_pages(SPEC, 10**15)


def test_pages_for_what_is_asked_for() -> None:
    assert plan_pages(SPEC, 1) == (1,)
    assert plan_pages(SPEC, 33) == (2,)
    small = ModelSpec("any", 100, 2048, 64, KVLayout(layers=1, kv_heads=1, head_dim=8))
    assert plan_pages(small, None) == (DEFAULT_TOKENS // 32,)


def test_layers_with_a_window_get_pages_for_the_windows_of_all_branches() -> None:
    layout = KVLayout(layers=18, kv_heads=1, head_dim=256, windows=(512,) * 15 + (0,) * 3)
    spec = ModelSpec("any", 100, 32768, 64, layout)
    whole, windowed = plan_pages(spec, 10**6, sequences=8)
    assert whole == 10**6 // 32
    assert windowed == 2 * 8 * (17 + 3) + 16  # and a chunk of a prompt
    assert plan_pages(spec, 1000, sequences=8) == (32, 32)  # never more than the positions need
    assert text_pages(spec) == (1024, 20)
    a_position = [group.page_bytes // 32 for group in layout.groups]
    assert a_position == [3 * 1024, 15 * 1024]
    assert cache_bytes(layout, text_pages(spec)) == 32768 * 3 * 1024 + 20 * 32 * 15 * 1024


def test_a_plan_fills_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout(layers=18, kv_heads=1, head_dim=256, windows=(512,) * 15 + (0,) * 3)
    spec = ModelSpec("any", 100, 32768, 64, layout)
    monkeypatch.setattr(capacity, "machine_memory", lambda: 1 << 30)
    pages = plan_pages(spec, None)
    assert pages[0] == pages[1]
    assert (1 << 28) - layout.page_bytes < cache_bytes(layout, pages) <= 1 << 28
    few = plan_pages(spec, None, sequences=4)
    assert few[0] > pages[0] > few[1]
    assert (1 << 28) - layout.page_bytes < cache_bytes(layout, few) <= 1 << 28
