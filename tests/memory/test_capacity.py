"""The number of pages follows from the memory that the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from mnemos.contract import KVLayout, ModelSpec
from mnemos.errors import CapacityError
from mnemos.memory.capacity import DEFAULT_TOKENS, plan_pages

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
        print(plan_pages(SPEC, None))
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
    assert plan_pages(SPEC, 1) == 1
    assert plan_pages(SPEC, 33) == 2
    small = ModelSpec("any", 100, 2048, 64, KVLayout(layers=1, kv_heads=1, head_dim=8))
    assert plan_pages(small, None) == DEFAULT_TOKENS // 32
