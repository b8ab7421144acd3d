"""Attention over tables that lack pages: a row sees what its table's pages hold, and nothing depends on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.ops.cases import AttentionCase, Table, batch_of, floats

from mnemos import _native
from mnemos.contract import KVLayout
from mnemos.errors import RequestError
from mnemos.formats.tensor import Tensor
from mnemos.ops.backends import get_ops
from mnemos.ops.native import NativeOps
from mnemos.ops.numpy import NumpyOps, round_to
from mnemos.ops.protocol import AttentionParams

CASES = (
    AttentionCase(6, 2, 64, 32),
    AttentionCase(4, 2, 24, 4, window=90),
    AttentionCase(3, 3, 17, 16, window=150, softcap=3.0),
    AttentionCase(16, 1, 32, 64),
    AttentionCase(2, 1, 16, 128, window=300),
)
LENGTH, CHUNK = 640, 40  # positions of a text, and how many of the last ones use a table with gaps
DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass
class Text:
    """Queries, keys and values of every position of one text, and the page of each page-sized run of positions."""

    case: AttentionCase
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: np.ndarray

    @staticmethod
    def random(case: AttentionCase, generator: np.random.Generator, pages: np.ndarray) -> Text:
        width, kv_width = case.heads * case.head_dim, case.kv_heads * case.head_dim
        return Text(case, *(floats(generator, LENGTH, n) for n in (width, kv_width, kv_width)), pages)

    def table(self, missing: Sequence[int] = ()) -> Table:
        """The page table without the pages with these numbers, counted from position 0."""
        kept = np.array([index for index in range(len(self.pages)) if index not in missing])
        return Table(self.pages[kept], self.case.page_size * kept)

    def dense(self, position: int, table: Table, dtype: str) -> np.ndarray:
        """The row of one position in float64 over the positions that it sees."""
        case = self.case
        held = (table.positions[:, None] + np.arange(case.page_size)).reshape(-1)
        seen = held[(held <= position) & ((position - held < case.window) if case.window else True)]
        shape = (LENGTH, case.kv_heads, case.head_dim)
        keys, values = (round_to(x.reshape(shape), dtype)[seen].astype(np.float64) for x in (self.k, self.v))
        keys, values = (x.repeat(case.heads // case.kv_heads, axis=1) for x in (keys, values))
        query = self.q[position].reshape(case.heads, case.head_dim).astype(np.float64)
        scores = np.einsum("hd,jhd->hj", query, keys) * case.params.scale
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.einsum("hj,jhd->hd", weights / weights.sum(axis=1, keepdims=True), values).reshape(-1)


def texts_of(case: AttentionCase, count: int, seed: int = 3) -> tuple[list[Text], np.random.Generator]:
    generator = np.random.default_rng(seed)
    each = LENGTH // case.page_size
    pages = generator.permutation(count * each).reshape(count, each)
    return [Text.random(case, generator, pages[t]) for t in range(count)], generator


def filled(ops: Any, texts: Sequence[Text], dtype: str) -> Any:
    """A cache that holds all positions of the texts but the last CHUNK. Every page is written as a sequence that has no
    other: only what is stored counts here, and rows that see few positions are quick."""
    case = texts[0].case
    pages = sum(len(text.pages) for text in texts)
    cache = ops.cache(KVLayout(1, case.kv_heads, case.head_dim, case.page_size, dtype), pages)
    starts = range(0, LENGTH - CHUNK, case.page_size)
    rows = [range(start, min(start + case.page_size, LENGTH - CHUNK)) for start in starts]
    for text in texts:
        tables = [Table(text.pages[i : i + 1], np.array([start])) for i, start in enumerate(starts)]
        attend(ops, cache, [text] * len(rows), rows, tables)
    return cache


def attend(ops: Any, cache: Any, texts: Sequence[Text], rows: Sequence[range], tables: Sequence[Table]) -> np.ndarray:
    """One step: row range i is of texts[i], with table i."""
    q, k, v = (
        np.concatenate(
            [getattr(text, name)[chosen.start : chosen.stop] for text, chosen in zip(texts, rows, strict=True)]
        )
        for name in "qkv"
    )
    return ops.attention(q, k, v, cache, 0, batch_of(rows, tables), texts[0].case.params)


def some_missing(case: AttentionCase, generator: np.random.Generator) -> list[int]:
    """Some pages before those of the new rows: single ones, and a run that holds a block of 128 positions."""
    before = (LENGTH - CHUNK) // case.page_size
    run = -(-160 // case.page_size)
    start = int(generator.integers(0, before - run))
    single = generator.permutation(before)[: before // 4].tolist()
    return sorted({*single, *range(start, start + run)})


def assert_close(result: np.ndarray, expected: np.ndarray, dtype: str, isa: str) -> None:
    # These levels round queries and weights to bfloat16 too.
    if dtype == "bfloat16" and isa in ("avx512_bf16", "amx", "amx_bf16"):
        error = np.abs(result - expected)
        assert error.max() < 0.02 and np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 0.004
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@dataclass
class Expected:
    """Two texts, their tables with gaps, and the last CHUNK rows of each in float64."""

    texts: list[Text]
    tables: list[Table]
    rows: np.ndarray  # (2, CHUNK, heads * head_dim)

    @staticmethod
    @cache  # one for all levels of kernels
    def of(case: AttentionCase, dtype: str) -> Expected:
        texts, generator = texts_of(case, 2)
        tables = [text.table(some_missing(case, generator)) for text in texts]
        rows = [
            [text.dense(p, table, dtype) for p in range(LENGTH - CHUNK, LENGTH)]
            for text, table in zip(texts, tables, strict=True)
        ]
        return Expected(texts, tables, np.array(rows))

    def assert_computed(self, ops: Any, count: int, dtype: str, isa: str = "") -> None:
        """The first `count` of the last rows of both texts, computed in one step, are as expected."""
        asked = range(LENGTH - CHUNK, LENGTH - CHUNK + count)
        result = attend(ops, filled(ops, self.texts, dtype), self.texts, [asked] * 2, self.tables)
        assert_close(result.reshape(2, count, -1), self.rows[:, :count], dtype, isa)


@pytest.mark.parametrize("rows", [1, CHUNK])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_sees_what_the_pages_of_its_table_hold(case: AttentionCase, dtype: str, rows: int, isa: str) -> None:
    Expected.of(case, dtype).assert_computed(NativeOps(), rows, dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_of_the_reference_sees_what_the_pages_of_its_table_hold(case: AttentionCase, dtype: str) -> None:
    for rows in (1, CHUNK):
        Expected.of(case, dtype).assert_computed(NumpyOps(), rows, dtype)


def test_torch_sees_what_the_pages_of_its_table_hold() -> None:
    torch = pytest.importorskip("torch")
    from mnemos.ops.torch import TorchOps
    from mnemos.ops.torch_batch import TorchBatch

    ops = TorchOps("cpu", "float32")

    class OnArrays:
        def cache(self, layout: KVLayout, pages: int) -> Any:
            return ops.cache(layout, pages)

        def attention(self, q: Any, k: Any, v: Any, cache: Any, layer: int, batch: Any, params: Any) -> np.ndarray:
            on_device = TorchBatch.of(batch, cache.layout, ops.device)
            return ops.attention(*map(torch.from_numpy, (q, k, v)), cache, layer, on_device, params).numpy()

    for case in CASES:
        texts, generator = texts_of(case, 2)
        cache = filled(OnArrays(), texts, "float32")
        tables = [text.table(some_missing(case, generator)) for text in texts]
        rows = [range(LENGTH - CHUNK, LENGTH - 7), range(LENGTH - CHUNK, LENGTH - CHUNK + 1)]
        result = attend(OnArrays(), cache, texts, rows, tables)
        expected = [texts[t].dense(p, tables[t], "float32") for t in range(2) for p in rows[t]]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gaps_give_the_same_bits_alone_among_others_and_in_chunks(case: AttentionCase, dtype: str, isa: str) -> None:
    ops = NativeOps()
    texts, generator = texts_of(case, 3)
    tables = [text.table(some_missing(case, generator)) for text in texts]
    last = range(LENGTH - CHUNK, LENGTH)
    together = attend(ops, filled(ops, texts, dtype), texts, [last] * 3, tables).reshape(3, CHUNK, -1)
    cache = filled(ops, texts, dtype)
    for text, table, expected in zip(texts, tables, together, strict=True):
        parts = []
        position = last.start
        while position < last.stop:
            stop = min(position + int(generator.choice([1, 2, 7])), last.stop)
            parts.append(attend(ops, cache, [text], [range(position, stop)], [table]))
            position = stop
        np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case.window], ids=str)
def test_pages_that_no_window_reaches_change_no_bit(case: AttentionCase, dtype: str, isa: str) -> None:
    ops = NativeOps()
    texts, _ = texts_of(case, 1)
    last = range(LENGTH - CHUNK, LENGTH)
    reached = (last.start - case.window + 1) // case.page_size
    whole, cut = (
        attend(ops, filled(ops, texts, dtype), texts, [last], [texts[0].table(range(missing))])
        for missing in (0, reached)
    )
    np.testing.assert_array_equal(cut.view(np.uint32), whole.view(np.uint32))


def test_work_is_shared_by_threads_where_a_table_has_gaps(isa: str) -> None:
    """A single row's blocks are split among threads and merged: the same bits as with one thread."""
    if _native.usable_cores() < 2:
        pytest.skip("needs two cores")
    case = CASES[0]
    texts, generator = texts_of(case, 1)
    table = texts[0].table(some_missing(case, generator))
    rows = [range(LENGTH - CHUNK, LENGTH - CHUNK + 1)]
    one, two = (
        attend(ops, filled(ops, texts, "float16"), texts, rows, [table]) for ops in (NativeOps(1), NativeOps(2))
    )
    np.testing.assert_array_equal(two.view(np.uint32), one.view(np.uint32))


WINDOWS = (0, 90, 0, 200, 90)


def in_groups(batch: Any, windows: Sequence[int], page_size: int) -> Any:
    """The batch of one layer group as one of several, whose page ids are shifted and whose tables have no pages that
    the group's window has left."""
    layout = KVLayout(len(windows), 1, 1, page_size, windows=tuple(windows))
    pages, positions, starts = [], [], [0]
    for s in range(batch.sequences):
        table = batch.table(s, 0, 1)
        first = batch.positions[batch.sequence_starts[s]]
        for number, group in enumerate(layout.groups):
            seen = batch.page_positions[table] + page_size > (first - group.window + 1 if group.window else 0)
            pages.append(batch.pages[table][seen] + number)
            positions.append(batch.page_positions[table][seen])
            starts.append(starts[-1] + int(seen.sum()))
    return replace(
        batch,
        pages=np.concatenate(pages),
        page_positions=np.concatenate(positions),
        page_starts=np.array(starts, dtype=np.int32),
    )


@pytest.mark.parametrize("backend", ["numpy", "native", "torch"])
def test_layers_in_groups_with_shorter_tables_give_the_same_bits(backend: str) -> None:
    """Layers with equal windows share pages of their own; those that a window has left are in no table."""
    if backend == "torch":
        pytest.importorskip("torch")
    ops = get_ops(backend)
    case = AttentionCase(4, 2, 16, 16)
    generator = np.random.default_rng(5)
    count = case.pages * len(case.steps[0])
    grouped = KVLayout(len(WINDOWS), 2, 16, 16, ops.cache_dtype, WINDOWS)
    assert [(group.window, group.layers) for group in grouped.groups] == [(0, (0, 2)), (200, (3,)), (90, (1, 4))]
    one, several = ops.cache(replace(grouped, windows=()), count), ops.cache(grouped, (count, count + 1, count + 2))
    matrix = ops.matrix(Tensor.from_array("embedding", floats(generator, 50, 64)))
    head = ops.matrix(Tensor.from_array("head", floats(generator, 50, 64)))

    def forward(ops: Any, batch: Any, cache: Any) -> Any:
        x = ops.embed(matrix, batch.token_ids)
        for layer, window in enumerate(WINDOWS):
            k, v = (ops.linear(x, sides[layer][i]) for i in range(2))
            params = AttentionParams(4, 2, 16, 0.25, window)
            x = ops.add(x, ops.attention(x, k, v, cache, layer, batch, params))
        x = ops.rows(x, batch.logit_rows)
        return x, ops.linear(x, head)

    sides = [[ops.matrix(Tensor.from_array("kv", floats(generator, 32, 64) / 8)) for _ in range(2)] for _ in WINDOWS]
    steps = ops.compile(forward, one), ops.compile(forward, several)
    for batch in case.batches(generator):
        rows = len(batch.positions)
        batch = replace(
            batch,
            token_ids=generator.integers(0, 50, rows).astype(np.int32),
            logit_rows=np.arange(rows, dtype=np.int32),
        )
        apart = in_groups(batch, WINDOWS, 16)
        expected, result = steps[0](batch).logits.copy(), steps[1](apart).logits.copy()
        assert np.isfinite(result).all()
        assert np.array_equal(result, expected) if backend != "torch" else np.allclose(result, expected, atol=1e-4)
        part = steps[1](apart.part(1, 3)).logits
        chosen = slice(batch.sequence_starts[1], batch.sequence_starts[3])
        assert np.allclose(part, expected[chosen], atol=1e-4)


def test_a_batch_has_a_page_table_for_each_sequence_and_group() -> None:
    ops, case = get_ops("native"), AttentionCase(2, 1, 16, 16, steps=((20, 3),))
    q, k, v = (floats(np.random.default_rng(0), 23, width) for width in (32, 16, 16))
    cache = ops.cache(KVLayout(2, 1, 16, 16, windows=(0, 8)), 4)
    with pytest.raises(RequestError, match="2 page tables; 2 sequences of a model with 2 layer groups have 4"):
        ops.attention(q, k, v, cache, 0, case.batches(np.random.default_rng(0))[0], case.params)
