"""A program's results do not depend on which of them stay in the form that the next product needs.

A result that the program returns as well is kept as rows of floats, and prepared for the product by a separate task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.cases import floats, quantized, weight

from mnemos.contract import Batch, KVLayout
from mnemos.ops.native import NativeOps
from mnemos.ops.protocol import AttentionParams

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCABULARY, PAGE_SIZE = 4, 2, 32, 64, 160, 50, 16
KEPT = ("embedded", "attended", "first sum", "gated")


class Layer:
    """An attention and a gated feed-forward network, both with biases, and the residual stream around them."""

    def __init__(self, ops: NativeOps, quantize: bool) -> None:
        generator = np.random.default_rng(3)
        make = quantized if quantize else weight

        def matrix(rows: int, columns: int) -> Any:
            return make(ops, generator, rows, columns)

        self.embedding = matrix(VOCABULARY, HIDDEN)
        self.q, self.o = matrix(HEADS * HEAD_DIM, HIDDEN), matrix(HIDDEN, HEADS * HEAD_DIM)
        self.k, self.v = (matrix(KV_HEADS * HEAD_DIM, HIDDEN) for _ in range(2))
        self.gate, self.up = (matrix(INNER, HIDDEN) for _ in range(2))
        self.down = matrix(HIDDEN, INNER)
        self.o_bias, self.gate_bias = floats(generator, HIDDEN), floats(generator, INNER)
        self.norm = 1 + floats(generator, HIDDEN) / 10

    def forward(self, ops: Any, batch: Any, cache: Any) -> dict[str, Any]:
        x = ops.embed(self.embedding, batch.token_ids)
        normed = ops.rms_norm(x, self.norm, 1e-5)
        params = AttentionParams(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
        q, k, v = (ops.linear(normed, weights) for weights in (self.q, self.k, self.v))
        attended = ops.attention(q, k, v, cache, 0, batch, params)
        first = ops.add(x, ops.linear(attended, self.o, self.o_bias))
        normed = ops.rms_norm(first, self.norm, 1e-5)
        gated = ops.gated_activation(ops.linear(normed, self.gate, self.gate_bias), ops.linear(normed, self.up), "silu")
        second = ops.add(ops.linear(gated, self.down), first)
        return {"embedded": x, "attended": attended, "first sum": first, "gated": gated, "second sum": second}


def _run(ops: NativeOps, layer: Layer, kept: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The result that is kept as floats, and the end of the layer."""

    def forward(ops: Any, batch: Any, cache: Any) -> tuple[Any, Any]:
        values = layer.forward(ops, batch, cache)
        return values[kept], values["second sum"]

    pages = -(-count // PAGE_SIZE)
    step = ops.compile(forward, ops.cache(KVLayout(1, KV_HEADS, HEAD_DIM, PAGE_SIZE), pages))
    numbers = np.arange(count, dtype=np.int32)
    ends = np.array([0, count], np.int32)
    table, page_starts = np.arange(pages, dtype=np.int32), np.array([0, pages], np.int32)
    output = step(Batch(numbers * 7 % VOCABULARY, numbers, ends, table, PAGE_SIZE * table, page_starts, numbers))
    return output.hidden.copy(), output.logits.copy()


@pytest.mark.parametrize("count", [1, 5, 133, 290])
@pytest.mark.parametrize("quantize", [True, False])
def test_bits_do_not_depend_on_the_form_of_results_between(isa: str, quantize: bool, count: int) -> None:
    ops = NativeOps()
    layer = Layer(ops, quantize)
    _, expected = _run(ops, layer, "second sum", count)
    assert np.isfinite(expected).all()
    for kept in KEPT:
        _, end = _run(ops, layer, kept, count)
        np.testing.assert_array_equal(end.view(np.uint32), expected.view(np.uint32), err_msg=kept)


def test_a_residual_that_is_read_later_is_not_overwritten(isa: str) -> None:
    """The sum may overwrite its addend, but not while anything else needs that."""
    ops = NativeOps(dtype="float32")
    layer = Layer(ops, quantize=False)
    embedded, _ = _run(ops, layer, "embedded", 133)
    rows = ops.embed(layer.embedding, np.arange(133, dtype=np.int32) * 7 % VOCABULARY)
    np.testing.assert_array_equal(embedded, rows)
    first, second = _run(ops, layer, "first sum", 133)
    gated, _ = _run(ops, layer, "gated", 133)
    np.testing.assert_allclose(second, first + ops.linear(gated, layer.down), rtol=1e-5, atol=1e-5)
