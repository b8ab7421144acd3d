"""Attention whose rows recall pages: as the reference, by each row alone, and whole while a text is short."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.ops.cases import AttentionCase, Table, batch_of, floats

from mnemos.contract import WHOLE_TEXT, KVLayout, Recall
from mnemos.errors import CapacityError, ConfigError, RequestError, UnsupportedError
from mnemos.native import core as _native
from mnemos.ops.native import NativeOps
from mnemos.ops.numpy import NumpyOps
from mnemos.ops.protocol import AttentionParams
from mnemos.ops.recall import index_keys, page_scores, seen_pages

CASES = (AttentionCase(6, 2, 64, 32), AttentionCase(2, 2, 17, 32, softcap=3.0), AttentionCase(4, 2, 24, 64))
DTYPES = ("float32", "float16", "bfloat16", "int8")
LENGTH = 480


def recall_of(case: AttentionCase, heads: tuple[int, ...] = (0,), sinks: int = 1) -> Recall:
    size = case.page_size
    components = tuple(range(case.head_dim // 3, case.head_dim))
    return Recall(2 * size, 3 * size, sinks * size, ((), heads), components)


def cache_of(ops: Any, case: AttentionCase, dtype: str, recall: Recall | None) -> Any:
    return ops.cache(
        KVLayout(2, case.kv_heads, case.head_dim, case.page_size, dtype, recall=recall), 2 * (LENGTH // 32 + 1)
    )


def attend(
    ops: Any, case: AttentionCase, cache: Any, pieces: list[int], seed: int = 1, texts: int = 1, memories: Any = ()
) -> np.ndarray:
    """All rows of `texts` equal texts in the second layer, evaluated in pieces of these lengths."""
    seen = np.array(memories, dtype=np.int32).reshape(-1, 3)
    generator = np.random.default_rng(seed)
    sizes = case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2
    q, k, v = (2 * floats(generator, LENGTH, size) for size in sizes)
    each = -(-LENGTH // case.page_size)
    pages = generator.permutation(texts * each).reshape(texts, each)
    tables = [Table(pages[t], case.page_size * np.arange(each)) for t in range(texts)]
    out, start = [], 0
    for piece in pieces:
        rows = range(start, min(start + piece, LENGTH))
        parts = [np.concatenate([x[rows.start : rows.stop]] * texts) for x in (q, k, v)]
        batch = replace(batch_of([rows] * texts, tables), memories=seen)
        out.append(ops.attention(*parts, cache, 1, batch, case.params))
        start = rows.stop
    assert start == LENGTH
    return np.concatenate(out)


WHOLE = [300, 180]
CHUNKS = [1, 200, 7, 100, 1, 1, 90, 33] + [1] * 20 + [27]


@lru_cache
def reference(case: AttentionCase, dtype: str, recall: Recall) -> np.ndarray:
    return attend(NumpyOps(), case, cache_of(NumpyOps(), case, dtype, recall), WHOLE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_see_what_the_reference_says(case: AttentionCase, dtype: str, isa: str) -> None:
    for recall in (recall_of(case, (1,)), recall_of(case, (0, 1), sinks=0)):
        expected = reference(case, dtype, recall)
        result = attend(NativeOps(), case, cache_of(NativeOps(), case, dtype, recall), WHOLE)
        error = np.abs(result - expected)
        # These levels round queries and weights to bfloat16 too.
        if dtype == "bfloat16" and isa in ("avx512_bf16", "amx", "amx_bf16"):
            assert error.max() < 0.1 and np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 0.006
        else:
            assert error.max() < 2e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_have_the_same_bits_in_chunks_and_among_others(case: AttentionCase, dtype: str, isa: str) -> None:
    ops, recall = NativeOps(), recall_of(case)
    whole = attend(ops, case, cache_of(ops, case, dtype, recall), WHOLE)
    chunks = attend(ops, case, cache_of(ops, case, dtype, recall), CHUNKS)
    assert np.array_equal(whole, chunks)
    twice = attend(ops, case, cache_of(ops, case, dtype, recall), [LENGTH], texts=2)
    assert np.array_equal(twice[LENGTH:], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_all_have_the_bits_of_an_engine_without_memory(dtype: str, isa: str) -> None:
    case, ops = CASES[0], NativeOps()
    recall = recall_of(case)
    plain, remembered = (attend(ops, case, cache_of(ops, case, dtype, r), WHOLE) for r in (None, recall))
    assert np.array_equal(plain[: recall.positions], remembered[: recall.positions])
    assert not np.array_equal(plain[recall.positions :], remembered[recall.positions :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_in_a_file_give_the_same_bits(case: AttentionCase, dtype: str, tmp_path: Path) -> None:
    ops, recall = NativeOps(), recall_of(case)
    expected = attend(ops, case, cache_of(ops, case, dtype, recall), CHUNKS)
    cache = cache_of(ops, case, dtype, recall)
    cache.spill(tmp_path)
    assert np.array_equal(attend(ops, case, cache, CHUNKS), expected)
    whole = -(-LENGTH // case.page_size)
    spilled = cache.spilled
    assert whole - recall.positions // case.page_size - 1 <= spilled + 1 and 0 < spilled < whole
    assert list(tmp_path.iterdir()) == []  # the file has no name
    contents = [cache.read(page) for page in range(whole)]  # from where they are
    assert all(content.any() for content in contents) and cache.spilled == spilled
    cache.copy(range(whole), range(whole))  # whatever needs a page in memory brings it back
    assert cache.spilled == 0
    assert all(np.array_equal(cache.read(page), content) for page, content in enumerate(contents))


Sizes = tuple[tuple[int, int, int], ...]
MEMORIES: Sizes = ((2, 3, 1), (1, 2, 1), (WHOLE_TEXT // 32, 0, 0), (4, 0, 0))


def attend_texts(ops: Any, dtype: str, recall: Recall | None, sizes: Sizes, begun: bool = False) -> list[np.ndarray]:
    """The rows of equal texts, each with a memory of these sizes; `begun`: the cache was made without one."""
    case, pieces = CASES[0], [100, 1, 250, 1, 128]
    cache = ops.cache(KVLayout(2, case.kv_heads, case.head_dim, 32, dtype, recall=None if begun else recall), 4 * 16)
    if begun:
        cache.begin_recall(recall)
    found = attend(ops, case, cache, pieces, texts=len(sizes), memories=sizes)
    parts = np.split(found, np.cumsum([piece * len(sizes) for piece in pieces])[:-1])
    return [np.concatenate([np.split(part, len(sizes))[n] for part in parts]) for n in range(len(sizes))]


@lru_cache
def reference_texts(dtype: str) -> list[np.ndarray]:
    return attend_texts(NumpyOps(), dtype, recall_of(CASES[0]), MEMORIES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_of_a_batch_see_as_much_as_each_of_them_is_to(dtype: str, isa: str) -> None:
    """In a cache with sizes of its own, and in one that began to recall; both alike with the reference."""
    ops, recall = NativeOps(), recall_of(CASES[0])
    found = attend_texts(ops, dtype, recall, ((0, 0, 0), *MEMORIES[1:]))
    begun = replace(recall, window=WHOLE_TEXT, recall=0, sinks=0)
    later = attend_texts(ops, dtype, begun, MEMORIES, begun=True)
    for one, other, expected, sizes in zip(found, later, reference_texts(dtype), MEMORIES, strict=True):
        assert np.array_equal(one, other)
        window, recalled, sinks = (32 * pages for pages in sizes)
        alone = replace(recall, window=window, recall=recalled, sinks=sinks)
        assert np.array_equal(one, attend_texts(ops, dtype, alone, ((0, 0, 0),))[0])
        assert np.abs(one - expected).max() < (0.1 if dtype == "bfloat16" else 2e-4)


def test_a_file_that_cannot_take_a_page_is_named(tmp_path: Path) -> None:
    case, ops = CASES[0], NativeOps()
    cache = cache_of(ops, case, "float32", recall_of(case))
    cache.cores[0].spill_to(os.open("/dev/full", os.O_RDWR))
    with pytest.raises(CapacityError, match="cannot take another .* No space left on device; choose a folder"):
        attend(ops, case, cache, CHUNKS)
    assert cache.spilled == 0
    with pytest.raises(ConfigError, match="folder is .*nowhere', where no file can be made"):
        cache.spill(tmp_path / "nowhere")


def test_a_row_recalls_the_page_of_its_best_key() -> None:
    """One key in page 7 of 20 fits the query; in a head that does not recall, the window is longer instead."""
    case = CASES[0]
    recall, generator = recall_of(case), np.random.default_rng(2)
    keys = floats(generator, 20, 32, 64)
    query = floats(generator, 3, 64)
    keys[7, 5] = 3 * query[1]
    codes, scales = index_keys(keys)
    seen = seen_pages(recall, 32, 20, query, codes, scales, recalls=True)
    assert seen[7] and seen[0] and list(np.flatnonzero(seen[-2:])) == [0, 1] and seen.sum() == 6
    assert list(np.flatnonzero(seen_pages(recall, 32, 20, query, codes, scales, False))) == [0, 16, 17, 18, 19, 20]


def test_ties_go_to_the_lower_page() -> None:
    keys = np.ones((20, 32, 8), dtype=np.float32)
    codes, scales = index_keys(keys)
    seen = seen_pages(recall_of(CASES[0]), 32, 20, np.ones((1, 8), dtype=np.float32), codes, scales, recalls=True)
    assert list(np.flatnonzero(seen)) == [0, 1, 2, 3, 19, 20]


def test_scores_follow_the_exact_products() -> None:
    """Also where all keys have some components that are large, as those of real models do."""
    generator = np.random.default_rng(3)
    keys, query = floats(generator, 60, 32, 64), floats(generator, 1, 64)
    for shared in (np.zeros(64, dtype=np.float32), 6 * floats(generator, 64)):
        scores, _ = page_scores(query, *index_keys(keys + shared))
        exact = ((keys + shared) @ query[0]).max(axis=1)
        assert np.corrcoef(scores[0], exact)[0, 1] > 0.85
        assert set(np.argsort(-exact)[:5]) <= set(np.argsort(-scores[0])[:20])


def test_each_query_of_a_group_names_pages_by_its_own_best() -> None:
    """A query with small products counts as much as one with large ones, but only for pages that it names."""
    case = CASES[0]
    keys, queries = np.zeros((20, 32, 64), dtype=np.float32), np.zeros((2, 64), dtype=np.float32)
    queries[0, 0], queries[1, 1] = 100, 1
    for page, size in ((3, 9), (5, 8), (6, 7), (9, 6), (11, 5)):
        keys[page, 4, 0] = size
    keys[13, 7, 1] = 9
    seen = seen_pages(recall_of(case), 32, 20, queries, *index_keys(keys), recalls=True)
    assert {0, 3, 13, 19, 20} <= set(np.flatnonzero(seen)) and seen.sum() == 6


def test_an_index_has_eight_values_of_a_component_in_32_keys() -> None:
    """From the least to the largest, as far apart as whole numbers allow, and each key has the nearest one."""
    keys = floats(np.random.default_rng(4), 3, 64, 8)
    keys[..., 7] = 0.25  # the same in every key
    values, scales = index_keys(keys)
    assert values.shape == keys.shape and scales.shape == keys.shape[:2]
    for run, indexed, scale in zip(
        keys.reshape(6, 32, 8), values.reshape(6, 32, 8), scales.reshape(6, 32), strict=True
    ):
        assert (scale == np.abs(run).max() / np.float32(124)).all()
        for component in range(8):
            levels = np.unique(indexed[:, component])
            spread = np.ptp(np.rint(run[:, component] / scale[0]).astype(int))
            step = max((spread + 3) // 7, 1)
            assert len(levels) <= 8 and (np.diff(levels.astype(int)) % step == 0).all()
            assert np.abs(run[:, component] / scale[0] - indexed[:, component]).max() <= step / 2 + 2.5


@pytest.mark.parametrize("last", [1, 40, 200])
@pytest.mark.parametrize("recalled", [3, 20])
def test_threads_that_share_a_long_text_find_what_the_reference_does(recalled: int, last: int, isa: str) -> None:
    """They share the pages for few rows, the rows of many. Every fifth page has the same keys, so that scores tie."""
    case, length = AttentionCase(2, 1, 16, 32), 4224
    recall, generator = replace(recall_of(case, (0,)), recall=32 * recalled), np.random.default_rng(6)
    q, k, v = (2 * floats(generator, length, n) for n in (32, 16, 16))
    k.reshape(-1, 32, 16)[::5] = k[:32]
    count, rows = length // 32, range(length - last, length)
    table = Table(generator.permutation(count), 32 * np.arange(count))
    caches = [ops.cache(KVLayout(2, 1, 16, 32, "float32", recall=recall), count) for ops in (NativeOps(), NumpyOps())]
    results = []
    for threads in (1, _native.usable_cores()):
        ops = NativeOps(threads)
        for part in (range(length - last), rows):
            own = [x[part.start : part.stop] for x in (q, k, v)]
            result = ops.attention(*own, caches[0], 1, batch_of([part], [table]), case.params)
        results.append(result)
    for stored, x in zip(caches[1].values[0][1], (k, v), strict=True):
        stored[table.pages] = x.reshape(count, 32, 1, 16)
    own = [x[rows.start :] for x in (q, k, v)]
    expected = NumpyOps().attention(*own, caches[1], 1, batch_of([rows], [table]), case.params)
    assert np.array_equal(*results) and np.abs(results[0] - expected).max() < 2e-4


@pytest.mark.parametrize("make", [NumpyOps, NativeOps])
def test_pages_are_copied_and_restored_with_their_index(make: Any) -> None:
    case, ops = CASES[0], make()
    recall = recall_of(case)
    one, other = cache_of(ops, case, "float16", recall), cache_of(ops, case, "float16", recall)
    expected = attend(ops, case, one, WHOLE)
    count = one.pages[0]
    for page in range(count // 2):
        one.copy([page], [page + count // 2])
    for page in range(count):
        other.write(page, one.read(page))
    each = -(-LENGTH // 32)
    pages = np.random.default_rng(1)
    for size in (case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2):
        floats(pages, LENGTH, size)
    order = pages.permutation(each)
    generator = np.random.default_rng(1)
    q, k, v = (2 * floats(generator, LENGTH, n) for n in (6 * 64, 2 * 64, 2 * 64))
    last = range(LENGTH - 1, LENGTH)
    for restored, moved in ((other, 0), (one, count // 2)):
        table = Table(order + moved, 32 * np.arange(each))
        row = ops.attention(q[-1:], k[-1:], v[-1:], restored, 1, batch_of([last], [table]), case.params)
        assert np.array_equal(row[0], expected[-1])


@pytest.mark.parametrize("naming", [(0,), (1, 2)])
def test_some_queries_of_a_head_name_its_pages(naming: tuple[int, ...], isa: str) -> None:
    case = CASES[0]
    recall = replace(recall_of(case, (0, 1)), naming=(((), ()), (naming, ())))
    found, expected = (
        attend(ops, case, cache_of(ops, case, "float32", recall), WHOLE) for ops in (NativeOps(), NumpyOps())
    )
    assert np.abs(found - expected).max() < 2e-4
    chunks = attend(NativeOps(), case, cache_of(NativeOps(), case, "float32", recall), CHUNKS)
    assert np.array_equal(found, chunks)
    everybody = reference(case, "float32", recall_of(case, (0, 1)))
    differs = np.abs(found - everybody).reshape(LENGTH, 2, -1).max(axis=2) > 1e-3
    assert differs[recall.positions :, 0].mean() > 0.3 and not differs[:, 1].any()


@pytest.mark.parametrize("sinks", [0, 1])
def test_what_is_recalled_is_measured_by_query(sinks: int) -> None:
    """The change is what would be missing if nothing were recalled; rows that see all of their text do not count."""
    case = CASES[0]
    recall = replace(recall_of(case, (1,), sinks), measured=True)
    caches = [cache_of(ops, case, "float32", recall) for ops in (NativeOps(), NumpyOps())]
    results = [attend(ops, case, cache, WHOLE) for ops, cache in zip((NativeOps(), NumpyOps()), caches, strict=True)]
    found = [cache.recalled() for cache in caches]
    assert found[0].shape == (2, 2, 2, 3) and not found[0][:, 0].any() and not found[0][:, 1, 0].any()
    assert np.allclose(*found, atol=1e-4)
    shares, changes = found[0][:, 1, 1]
    assert shares.min() > 0.35 and shares.max() < 0.75  # three pages of six, with random keys
    nothing = replace(recall, recall=0)
    alone = attend(NumpyOps(), case, cache_of(NumpyOps(), case, "float32", nothing), WHOLE)
    moved = np.linalg.norm((results[1] - alone).reshape(LENGTH, 2, 3, 64), axis=3)[recall.positions :, 1]
    assert np.allclose(changes, moved.mean(axis=0), rtol=0.05)  # shares of almost all are limited


def test_what_recall_cannot_hold_is_named() -> None:
    case, ops = AttentionCase(2, 1, 16, 16), NativeOps()
    with pytest.raises(ConfigError, match="multiple of 32 positions"):
        cache_of(ops, case, "float32", recall_of(case, (0,)))
    case = CASES[0]
    cache = cache_of(ops, case, "float32", recall_of(case))
    table = Table(np.arange(6), np.array([0, *range(64, 224, 32)]))
    x = [np.zeros((1, n), dtype=np.float32) for n in (6 * 64, 2 * 64, 2 * 64)]
    batch = batch_of([range(200, 201)], [table])
    with pytest.raises(RequestError, match="gap before position 64"):
        ops.attention(*x, cache, 1, batch, case.params)
    plain = cache_of(ops, case, "float32", None)
    for sizes, held, message in [
        ([[0, 1, 0]], cache, "memory of sequence 0 is a window of 0 pages, 1 recalled ones and 0 sinks; it needs"),
        ([[1, -1, 0]], cache, "a window of 1 pages, -1 recalled ones"),
        ([[1, 1, 0]] * 2, cache, "the batch has 6 sizes of memories; it needs three for each of its 1 sequences"),
        ([[1, 1, 0]], plain, "the batch has memories, and the cache does not recall"),
    ]:
        with pytest.raises(RequestError, match=message):
            ops.attention(*x, held, 1, replace(batch, memories=np.array(sizes, dtype=np.int32)), case.params)
    with pytest.raises(ConfigError, match="recalls already"):
        cache.cores[0].begin_recall((1, 1, 1, 0, [True] * 4, [0], [[]] * 4, False))
    with pytest.raises(ConfigError, match="negative number of a query"):
        cache_of(ops, case, "float32", replace(recall_of(case), naming=(((), ()), ((-1,), ()))))
    cache = cache_of(ops, case, "float32", replace(recall_of(case), naming=(((), ()), ((3,), ()))))
    with pytest.raises(ConfigError, match="query 3 is to name pages, and heads have 3"):
        attend(ops, case, cache, WHOLE)


def test_a_layer_with_a_window_recalls_nothing() -> None:
    case = AttentionCase(6, 2, 64, 32, window=100)
    assert case.params == AttentionParams(6, 2, 64, 0.125, 100)
    for ops in (NumpyOps(), NativeOps()):
        plain, remembered = (
            attend(ops, case, cache_of(ops, case, "float32", r), WHOLE) for r in (None, recall_of(case, (0, 1)))
        )
        assert np.array_equal(plain, remembered)


def test_torch_refuses_it() -> None:
    pytest.importorskip("torch")
    from mnemos.ops.torch import TorchOps

    with pytest.raises(UnsupportedError, match="backend 'torch'"):
        cache_of(TorchOps("cpu", "float32"), CASES[0], "float32", recall_of(CASES[0]))
