"""Bad input to the native backend is an exception that says what is wrong, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from tests.ops.cases import AttentionCase, floats

from mnemos import _native
from mnemos.contract import Batch, KVLayout
from mnemos.errors import CapacityError, ConfigError, MnemosError, RequestError, UnsupportedError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.machine.memory import check_memory
from mnemos.ops.backends import get_ops
from mnemos.ops.native import NativeOps

GENERATOR = np.random.default_rng(0)
CASE = AttentionCase(2, 1, 16, 16, steps=((20, 3),))


def _attend(batch: Batch, rows: int | None = None) -> None:
    ops = NativeOps()
    count = len(batch.positions) if rows is None else rows
    q, k, v = (floats(GENERATOR, count, width) for width in (32, 16, 16))
    ops.attention(q, k, v, ops.cache(KVLayout(1, 1, 16, 16), 4), 0, batch, CASE.params)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": _ints(0, 4, 1, 2)}, "page 4"),
        ({"pages": _ints(-1, 3, 1, 2)}, "page -1"),
        ({"pages": _ints(0, 1, 2)}, "page_positions as pages; it has 4 and 3"),
        ({"pages": _ints(0, 1, 2), "page_positions": _ints(0, 16, 0)}, "page_starts must rise from 0 to 3"),
        ({"page_starts": _ints(0, 1, 4)}, "no page for position 16"),
        ({"page_positions": _ints(0, 16, 0, 24)}, "position 24; pages begin at multiples of 16"),
        ({"page_positions": _ints(-16, 0, 0, 16)}, "position -16"),
        ({"page_positions": _ints(16, 0, 0, 16)}, "do not ascend: 16 is followed by 0"),
        ({"page_positions": _ints(0, 0, 0, 16)}, "do not ascend: 0 is followed by 0"),
        ({"page_positions": _ints(0, 32, 0, 16)}, "sequence 0 has no page for position 16"),
        ({"page_positions": _ints(0, 16, 16, 32)}, "sequence 1 has no page for position 0"),
        ({"page_starts": _ints(0, 4)}, "page_starts"),
        ({"page_starts": _ints(0, 4, 4)}, "do not ascend"),
        (
            {"page_starts": _ints(0, 2, 2), "pages": _ints(0, 1), "page_positions": _ints(0, 16)},
            "no page for position 0",
        ),
        ({"sequence_starts": _ints(0, 24, 23)}, "sequence_starts"),
        ({"sequence_starts": _ints(0, 20, 22)}, "sequence_starts"),
        ({"positions": np.zeros(23, dtype=np.int32)}, "consecutive"),
        ({"positions": np.arange(-20, 3, dtype=np.int32)}, "negative"),
    ],
)
def test_a_batch_that_points_outside_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    batch = CASE.batches(GENERATOR)[0]
    _attend(batch)
    with pytest.raises(RequestError, match=message):
        _attend(replace(batch, **change))


def test_operands_of_the_wrong_shape_or_type_are_refused() -> None:
    ops = NativeOps()
    x, matrix = floats(GENERATOR, 3, 64), ops.matrix(Tensor.from_array("w", floats(GENERATOR, 8, 64)))
    with pytest.raises(ConfigError, match="63"):
        ops.linear(x[:, :63], matrix)
    with pytest.raises(ConfigError, match="bias"):
        ops.linear(x, matrix, np.zeros(7, dtype=np.float32))
    with pytest.raises(ConfigError, match="norm"):
        ops.rms_norm(x, np.ones(48, dtype=np.float32), 1e-5)
    with pytest.raises(ConfigError, match="swish"):
        ops.activation(x, "swish")
    with pytest.raises(ConfigError, match="float32 or int32"):
        ops.scale(x.astype(np.float64), 2.0)
    with pytest.raises(ConfigError, match="top_k is 9"):
        ops.route(x, matrix, 9, True)
    with pytest.raises(RequestError, match="token id 8"):
        ops.embed(matrix, _ints(1, 8))
    with pytest.raises(RequestError, match="row 3"):
        ops.rows(x, _ints(3))
    with pytest.raises(RequestError, match="expert 1"):
        ops.experts(x, np.ones((3, 1), dtype=np.int32), x[:, :1].copy(), [matrix], [matrix], [_square(ops)], "silu")
    _attend(CASE.batches(GENERATOR)[0])
    with pytest.raises(ConfigError, match="shape"):
        _attend(CASE.batches(GENERATOR)[0], rows=22)


def _square(ops: NativeOps) -> _native.Matrix:
    return ops.matrix(Tensor.from_array("w", floats(GENERATOR, 64, 8)))


def test_weights_whose_bytes_do_not_fit_are_refused() -> None:
    ops = NativeOps()
    data = np.zeros(34, dtype=np.uint8)
    with pytest.raises(ConfigError, match="34 bytes"):
        ops.matrix(Tensor("w", TensorType.Q8_0, (2, 32), data))
    with pytest.raises(ConfigError, match="block"):
        ops.matrix(Tensor("w", TensorType.Q8_0, (1, 33), data))
    with pytest.raises(UnsupportedError, match="27"):
        ops.matrix(Tensor("w", TensorType.I64, (1, 4), data[:32]))
    for rows in ([0, 1], [-1], []):
        with pytest.raises(ConfigError, match="order names"):
            ops.matrix(Tensor("w", TensorType.Q8_0, (1, 32), data), np.array(rows, dtype=np.intp))


def test_threads_and_caches_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=str(_native.usable_cores())):
        NativeOps(threads=_native.usable_cores() + 1)
    with pytest.raises(ConfigError, match="threads"):
        NativeOps(threads=0)
    with pytest.raises(ConfigError, match="dtype"):
        NativeOps(dtype="float8")
    with pytest.raises(ConfigError, match="page_size"):
        NativeOps().cache(KVLayout(1, 1, 16, page_size=24), 4)
    with pytest.raises(ConfigError, match="float8"):
        NativeOps().cache(KVLayout(1, 1, 16, dtype="float8"), 4)
    with pytest.raises(CapacityError):
        NativeOps().cache(KVLayout(1000, 1000, 1024), 2**31)
    with pytest.raises(RequestError, match="page 4"):
        NativeOps().cache(KVLayout(1, 1, 16), 4).read(4)
    with pytest.raises(ConfigError, match="bytes"):
        NativeOps().cache(KVLayout(1, 1, 16), 4).write(0, np.zeros(5, dtype=np.uint8))


def test_memory_that_is_not_there_is_missed_before_loading() -> None:
    check_memory(1, "a small thing")
    with pytest.raises(CapacityError, match=r"a large thing needs 1000000000 MB .* are missing"):
        check_memory(10**15, "a large thing")


def test_unknown_backend_lists_those_that_are_known() -> None:
    with pytest.raises(UnsupportedError, match="numpy"):
        get_ops("cuda")


OTHER_MACHINES = "avx2" if "neon" in _native.available_isas() else "neon"


@pytest.mark.parametrize("name", ["avx1024", "AVX2", OTHER_MACHINES])
def test_an_instruction_set_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="scalar"):
        _native.select_isa(name)
    script = "from mnemos import _native; print(_native.isa('floats'))"
    environment = {**os.environ, "MNEMOS_ISA": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"MNEMOS_ISA is '{name}'" in done.stderr and "scalar" in done.stderr


def test_errors_are_of_the_one_hierarchy() -> None:
    with pytest.raises(MnemosError):
        NativeOps(threads=10**6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_its_own_threads() -> None:
    script = """
import os, numpy as np
from mnemos.ops.native import NativeOps
from mnemos.formats.tensor import Tensor
ops = NativeOps()
x, w = np.ones((9, 64), np.float32), Tensor.from_array("w", np.ones((300, 64), np.float32))
before = ops.linear(x, ops.matrix(w))
child = os.fork()
same = np.array_equal(ops.linear(x, ops.matrix(w)), before)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_one_backend_serves_several_python_threads() -> None:
    ops = NativeOps()
    matrix = ops.matrix(Tensor.from_array("w", floats(GENERATOR, 100, 64)))
    x = floats(GENERATOR, 5, 64)
    expected, failures = ops.linear(x, matrix), []

    def work() -> None:
        for _ in range(50):
            if not np.array_equal(NativeOps().linear(x, matrix), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
