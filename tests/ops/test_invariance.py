"""A token's results are the same bits whatever else runs, however its prompt is cut, by any number of threads."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from tests.ops.cases import floats, quantized

from mnemos import _native
from mnemos.bench.busy import busy_programs
from mnemos.contract import Batch, KVLayout, Output
from mnemos.formats.tensor import Tensor
from mnemos.ops.native import NativeOps, Value
from mnemos.ops.protocol import AttentionParams, RopeParams

VOCABULARY, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, PAGE_SIZE = 90, 64, 96, 4, 2, 16, 2, 16
PAGES = 24  # of one sequence
LENGTHS = (1, 5, 37, 150, 290)


class SmallModel:
    """Two layers of a llama with normalised heads, one of them a mixture of experts with a window."""

    def __init__(self, ops: NativeOps, kv_dtype: str = "float16", sequences: int = len(LENGTHS)) -> None:
        generator = np.random.default_rng(11)
        width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

        def matrix(rows: int, columns: int) -> Any:
            return quantized(ops, generator, rows, columns)

        self.ops = ops
        self.embedding = matrix(VOCABULARY, HIDDEN)
        self.q, self.k, self.v = ([matrix(rows, HIDDEN) for _ in range(LAYERS)] for rows in (width, kv_width, kv_width))
        self.o = [matrix(HIDDEN, width) for _ in range(LAYERS)]
        self.router = matrix(5, HIDDEN)
        self.gate, self.up = ([matrix(INNER, HIDDEN) for _ in range(5)] for _ in range(2))
        self.down = [matrix(HIDDEN, INNER) for _ in range(5)]
        self.norm, self.head_norm = 1 + floats(generator, HIDDEN) / 10, 1 + floats(generator, HEAD_DIM) / 10
        self.rope = RopeParams(HEAD_DIM, HEAD_DIM, (100.0 ** -np.linspace(0, 1, HEAD_DIM // 2)).astype(np.float32))
        cache = ops.cache(KVLayout(LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE, kv_dtype), PAGES * sequences)
        self.step = ops.compile(self.forward, cache)

    def forward(self, ops: Any, batch: Any, cache: Any) -> tuple[Any, Any]:
        x = ops.embed(self.embedding, batch.token_ids)
        for layer in range(LAYERS):
            x = ops.add(x, self.attend(ops, ops.rms_norm(x, self.norm, 1e-5), batch, cache, layer))
            x = ops.add(x, self.mix(ops, ops.rms_norm(x, self.norm, 1e-5), layer))
        hidden = ops.rms_norm(ops.rows(x, batch.logit_rows), self.norm, 1e-5)
        return hidden, ops.softcap(ops.linear(hidden, self.embedding), 30.0)

    def attend(self, ops: Any, x: Any, batch: Any, cache: Any, layer: int) -> Any:
        q, k, v = (ops.linear(x, weights[layer]) for weights in (self.q, self.k, self.v))
        q, k = (ops.rope(ops.rms_norm(h, self.head_norm, 1e-6), batch.positions, self.rope) for h in (q, k))
        params = AttentionParams(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, window=40 * layer)
        return ops.linear(ops.attention(q, k, v, cache, layer, batch, params), self.o[layer])

    def mix(self, ops: Any, x: Any, layer: int) -> Any:
        if layer == 0:
            gated = ops.gated_activation(ops.linear(x, self.gate[0]), ops.linear(x, self.up[0]), "silu")
            return ops.linear(gated, self.down[0])
        ids, weights = ops.route(x, self.router, 2, True)
        return ops.experts(x, ids, weights, self.gate, self.up, self.down, "gelu_tanh")


def _batch(tokens: list[np.ndarray], done: list[int], pages: np.ndarray) -> Batch:
    """One step of some sequences, with logits for every row."""
    lengths = [len(t) for t in tokens]
    positions = np.concatenate([np.arange(d, d + n) for d, n in zip(done, lengths, strict=True)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    page_starts = np.arange(0, pages.size + 1, pages.shape[1])
    rows = np.arange(starts[-1])
    page_positions = np.tile(PAGE_SIZE * np.arange(pages.shape[1]), len(pages))
    arrays = (np.concatenate(tokens), positions, starts, pages.reshape(-1), page_positions, page_starts, rows)
    return Batch(*(array.astype(np.int32) for array in arrays))


def _alone(model: SmallModel, texts: list[np.ndarray]) -> list[Output]:
    """Each text in a separate step."""
    pages = np.arange(PAGES)[None]
    outputs = (model.step(_batch([text], [0], pages)) for text in texts)
    return [Output(output.logits.copy(), output.hidden.copy()) for output in outputs]


def _together(model: SmallModel, texts: list[np.ndarray], generator: np.random.Generator) -> list[list[np.ndarray]]:
    """All texts in random chunks, random sequences per step, on random pages: each text's rows of logits and hidden."""
    pages = generator.permutation(PAGES * len(texts)).reshape(len(texts), PAGES)
    done = [0] * len(texts)
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        active = [s for s in generator.permutation(len(texts)) if done[s] < len(texts[s])]
        active = active[: generator.integers(1, len(active) + 1)]
        chunks = [texts[s][done[s] : done[s] + generator.choice([1, 1, 2, 7, 64, 200])] for s in active]
        output = model.step(_batch(chunks, [done[s] for s in active], pages[active]))
        at = 0
        for s, chunk in zip(active, chunks, strict=True):
            both = np.concatenate([output.logits, output.hidden], axis=1)
            rows[s].append(both[at : at + len(chunk)])
            at += len(chunk)
            done[s] += len(chunk)
    return rows


def _texts() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, VOCABULARY, length) for length in LENGTHS]


def _assert_same_bits(rows: list[list[np.ndarray]], expected: list[Output]) -> None:
    for parts, output in zip(rows, expected, strict=True):
        whole = np.concatenate([output.logits, output.hidden], axis=1)
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32))


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8"])
def test_bits_do_not_depend_on_batch_chunks_pages_or_threads(isa: str, kv_dtype: str) -> None:
    expected = _alone(SmallModel(NativeOps(threads=1), kv_dtype), _texts())
    for threads in {1, _native.usable_cores()}:
        model = SmallModel(NativeOps(threads=threads), kv_dtype)
        for seed in range(2):
            _assert_same_bits(_together(model, _texts(), np.random.default_rng(seed)), expected)


def test_bits_do_not_depend_on_other_programs_on_the_cores() -> None:
    """Threads leave steps before they lose their cores, and join in the middle."""
    expected = _alone(SmallModel(NativeOps(threads=1)), _texts())
    ops = NativeOps()
    model = SmallModel(ops)
    cores, contended, end = _native.usable_cores(), 0, time.monotonic() + 20
    with busy_programs(cores):
        while contended < 5 and time.monotonic() < end:
            _assert_same_bits(_together(model, _texts(), np.random.default_rng(contended)), expected)
            contended += ops.pool.contended
    assert contended == 5 or cores == 1


def test_float32_weights_keep_the_bits_too(isa: str) -> None:
    expected = _alone(SmallModel(NativeOps(threads=1, dtype="float32"), "float32"), _texts())
    model = SmallModel(NativeOps(dtype="float32"), "float32")
    _assert_same_bits(_together(model, _texts(), np.random.default_rng(1)), expected)


def test_nothing_is_read_from_the_workspace_that_the_step_did_not_write(isa: str) -> None:
    """The workspace is full of NaN before each step."""
    ops = NativeOps()
    expected = _alone(SmallModel(ops), _texts())
    programs: list[_native.Program] = []

    def recorded(model: SmallModel) -> Any:
        def forward(ops: Any, batch: Any, cache: Any) -> tuple[Value, Value]:
            programs.append(batch.token_ids.program)
            return model.forward(ops, batch, cache)

        return forward

    model = SmallModel(ops)
    model.step = ops.compile(recorded(model), ops.cache(KVLayout(LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE), PAGES * 5))
    programs[0].poison(True)
    _assert_same_bits(_together(model, _texts(), np.random.default_rng(3)), expected)


def test_denormal_numbers_are_zero_in_every_thread() -> None:
    """Else they would take a hundred cycles each, and a result's bits would depend on the thread."""
    tiny = np.float32(1e-39)
    for threads in {1, _native.usable_cores()}:
        ops = NativeOps(threads=threads, dtype="float32")
        weight = ops.matrix(Tensor.from_array("weight", np.full((640, 64), tiny)))
        embedding = ops.matrix(Tensor.from_array("embedding", np.full((4, 64), np.float32(1e3))))

        def forward(
            ops: Any, batch: Any, cache: Any, embedding: Any = embedding, weight: Any = weight
        ) -> tuple[Any, Any]:
            x = ops.rows(ops.embed(embedding, batch.token_ids), batch.logit_rows)
            return x, ops.linear(x, weight)

        step = ops.compile(forward, ops.cache(KVLayout(1, 1, 16, PAGE_SIZE, "float32"), 1))
        output = step(_batch([np.arange(4)], [0], np.arange(1)[None]))
        np.testing.assert_array_equal(output.logits, np.zeros((4, 640), dtype=np.float32))
