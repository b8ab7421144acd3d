"""The most probable tokens, found without all logits, are the same as with all logits."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.test_linear import ALL_BFLOAT_LEVEL, random_weight

from mnemos import _native
from mnemos.errors import ConfigError
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.native import NativeOps

Kind = TensorType
BOUNDED = (Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.Q3_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS)
STARTS = np.zeros(1, dtype=np.int32)
NO_PAGES = np.zeros(0, dtype=np.int32)


class Head:
    """A program whose last output is a product of chosen rows with a weight."""

    def __init__(self, weight: Tensor, bias: np.ndarray | None = None, threads: int | None = None) -> None:
        ops = NativeOps(threads)
        self.matrix = ops.matrix(weight)
        ops.finish()
        self.program = _native.Program(ops.pool, [])
        self.program.poison(True)
        x = self.program.rows(self.program.input(weight.columns, integers=False))
        self.program.finish([x, self.program.linear(x, self.matrix, bias)])

    def run(self, x: np.ndarray, argmax: bool) -> np.ndarray:
        rows = np.arange(len(x), dtype=np.int32)
        results = self.program.run(rows, rows, STARTS, NO_PAGES, NO_PAGES, STARTS, rows, [x], argmax)
        return results[1].copy()


def states(rows: int, columns: int) -> np.ndarray:
    """Rows of all sizes; one has outliers, which coarse activations round most."""
    x = np.random.default_rng([rows, columns]).standard_normal((rows, columns)).astype(np.float32)
    x *= np.float32(10) ** np.arange(-3, rows - 3, dtype=np.float32)[:, None].clip(-3, 3)
    x[1, ::17] *= 300
    return x


def without_bounds(level: str) -> None:
    """Skips the test at the level that multiplies a head once, in bfloat16, and needs no bounds for that."""
    if level == ALL_BFLOAT_LEVEL:
        assert not Head(random_weight(Kind.Q8_0, 64, 64)).program.finds_argmax
        pytest.skip("all logits are computed there")


@pytest.mark.parametrize("kind", BOUNDED, ids=lambda kind: kind.name)
def test_found_alone_as_among_all(isa: str, kind: TensorType) -> None:
    without_bounds(isa)
    columns = 576 if kind.block[0] == 32 else 1536
    for rows, vocabulary in ((1, 100), (9, 1000), (300, 77)):
        head = Head(random_weight(kind, vocabulary, columns))
        assert head.program.finds_argmax
        x = states(max(rows, 2), columns)[:rows]
        logits = head.run(x, argmax=False)
        np.testing.assert_array_equal(head.run(x, argmax=True)[:, 0], logits.argmax(axis=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_of_equal_logits_the_first(isa: str, threads: int) -> None:
    """Tokens that occur many times, and others so close to them that coarse activations cannot tell them apart."""
    without_bounds(isa)
    columns, different, copies = 256, 50, 40
    small = random_weight(Kind.Q8_0, different, columns)
    near = small.data.reshape(different, -1).copy()
    near[:, 5] ^= 1  # one code by one step
    data = np.concatenate([np.tile(small.data.reshape(different, -1), (copies, 1)), near])
    weight = Tensor("weight", Kind.Q8_0, (len(data), columns), data.reshape(-1))
    head = Head(weight, threads=min(threads, _native.usable_cores()))
    x = states(40, columns)
    logits = head.run(x, argmax=False)
    np.testing.assert_array_equal(head.run(x, argmax=True)[:, 0], logits.argmax(axis=1))


def test_rows_without_a_most_probable_token_say_so(isa: str) -> None:
    without_bounds(isa)
    weight = random_weight(Kind.Q8_0, 200, 64)
    broken = weight.data.reshape(200, 2, 34).copy()
    broken[150, 0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    x = states(20, 64)
    x[3, 7] = np.nan
    x[5, 9] = np.inf
    found = Head(weight).run(x, argmax=True)[:, 0]
    assert (found[[3, 5]] == -1).all() and (np.delete(found, [3, 5]) >= 0).all()
    assert (Head(Tensor("weight", Kind.Q8_0, (200, 64), broken.reshape(-1))).run(x, argmax=True) == -1).all()


def test_only_where_there_are_bounds(isa: str) -> None:
    bias = np.zeros(64, dtype=np.float32)
    for head in (
        Head(random_weight(Kind.Q8_0, 64, 64), bias),
        Head(random_weight(Kind.Q4_1, 64, 64)),
        Head(random_weight(Kind.F16, 64, 64)),
    ):
        assert not head.program.finds_argmax
        with pytest.raises(ConfigError, match="best of its last output"):
            head.run(states(2, 64), argmax=True)
