"""Operators that note what every weight is multiplied with, for calibration.

Attention averages values over positions before anything else sees them, so an error that they have in common counts in
full and one that differs from position to position hardly at all. What a value projection is really multiplied with is
therefore the attention's average of its inputs, another one for each head.

What is added to the residual stream is divided by the stream's length in the next norm, so in its products each input
counts by the inverse square of that length. A few tokens, such as the first one, have streams a hundred times as long
as others (Sun et al. 2024, arXiv:2402.17762) and would else decide alone what the weights are fitted to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mnemos.contract import Batch, Floats, Ints, Output
from mnemos.formats.tensor import Tensor
from mnemos.ops.protocol import AttentionParams, Forward, Ops, Rows

_LATEST = 4  # products whose results are recognised in what follows: values, gates and what is added to the stream


@dataclass
class Sums:
    """What has been summed over the inputs of a weight: `squares` (columns,) and `products` (columns, columns).

    weight: the sum of what the inputs count in the products.
    """

    squares: npt.NDArray[np.float64]
    products: Floats | None = None
    tokens: int = 0
    weight: float = 0.0

    def add(self, x: Floats) -> None:
        """Takes the inputs x (T, columns), their products excepted."""
        self.tokens += len(x)
        self.squares += np.einsum("tc,tc->c", x, x, dtype=np.float64)

    def add_products(self, x: Floats, weights: Floats | None = None) -> None:
        """Takes the products of the inputs x (T, columns), each times its own of `weights` (T,), or 1."""
        if self.products is None:
            return
        self.weight += len(x) if weights is None else float(weights.sum())
        scaled = x if weights is None else x * np.sqrt(weights)[:, None]
        self.products += scaled.T @ scaled  # of one array with itself: half of the work


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A matrix of the inner backend, and the tensor that it is (of); `expert` numbers those in one tensor."""

    inner: Any
    tensor: str
    expert: int


@dataclass(eq=False)
class _Product:
    """A product that was computed: its result, its input, its tensor, and the sums that wait for the products of the
    input's columns, if any do."""

    result: Floats
    x: Floats
    tensor: str
    waiting: Sums | None


class RecordingOps:
    """The operators of `inner`, run one by one, which sum up the inputs of each weight; see `as_ops`.

    tensors: the checkpoint's. Weights that are multiplied with the same array share one `Sums`, as queries, keys and
    values do.
    """

    def __init__(self, inner: Ops, tensors: Mapping[str, Tensor]) -> None:
        self.inner = inner
        self.tensors = tensors
        self.full: Callable[[str], bool] = lambda tensor: False
        self.sums: dict[tuple[str, int], Sums] = {}  # by tensor and expert
        self.averaged: dict[str, list[Sums]] = {}  # of value projections: by tensor, for each key/value head
        self._made: dict[str, int] = {}  # how many matrices were made of a tensor before
        self._chunk = 0  # batches since `begin`
        self._latest: tuple[Floats, Sums] | None = None  # the latest input and where it was added
        self._products: deque[_Product] = deque()  # the latest ones, at most _LATEST

    def begin(self, full: Callable[[str], bool]) -> None:
        """Forgets all sums. full: tensors of which the products of all pairs of columns are wanted, besides squares."""
        self.full = full
        self.sums, self.averaged = {}, {}
        self._chunk = 0

    def as_ops(self) -> Ops:
        """This object as what an architecture calls; what is not defined here is the inner backend's."""
        return cast(Ops, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def matrix(self, tensor: Tensor, rows: Rows | None = None) -> _Recorded:
        made = self._made.get(tensor.name, 0)
        self._made[tensor.name] = made + 1
        shape = self.tensors[tensor.name].shape
        return _Recorded(self.inner.matrix(tensor, rows), tensor.name, made % shape[0] if len(shape) == 3 else 0)

    def compile(self, forward: Forward, cache: Any) -> Callable[[Batch], Output]:
        def step(batch: Batch) -> Output:
            self._latest = None
            hidden, logits, *_ = forward(self.as_ops(), batch, cache)
            self._forget(0)
            self._chunk += 1
            return Output(logits=logits, hidden=hidden)

        return step

    def embed(self, matrix: _Recorded, token_ids: Ints) -> Any:
        return self.inner.embed(matrix.inner, token_ids)

    def linear(self, x: Floats, matrix: _Recorded, bias: Floats | None = None) -> Any:
        waiting = self._note(x, matrix)
        result = self.inner.linear(x, matrix.inner, bias)
        self._products.append(_Product(result, x, matrix.tensor, waiting))
        self._forget(_LATEST)
        return result

    def add(self, x: Floats, y: Floats) -> Any:
        total = self.inner.add(x, y)
        for product in self._products:
            if product.waiting is not None and (product.result is x or product.result is y):
                product.waiting.add_products(product.x, _inverse_squares(total))
                product.waiting = None
        return total

    def _forget(self, left: int) -> None:
        """Drops all but the `left` latest products; those that were added to nothing count all inputs alike."""
        while len(self._products) > left:
            product = self._products.popleft()
            if product.waiting is not None:
                product.waiting.add_products(product.x)

    def attention(
        self, q: Floats, k: Floats, v: Floats, cache: Any, layer: int, batch: Batch, params: AttentionParams
    ) -> Any:
        found = next((product for product in self._products if product.result is v), None)
        if found is not None and self._chunk % (params.heads // params.kv_heads) == 0:
            x, tensor = found.x, found.tensor
            if self.full(tensor) and self.tensors[tensor].rows == v.shape[1]:  # not together with queries and keys
                self._average(
                    x, tensor, lambda values: self.inner.attention(q, k, values, cache, layer, batch, params), params
                )
        return self.inner.attention(q, k, v, cache, layer, batch, params)

    def _average(self, x: Floats, tensor: str, attend: Callable[[Floats], Floats], params: AttentionParams) -> None:
        """Sums up each head's average of x (T, columns), found by attending to pieces of x in place of values."""
        columns, size = x.shape[1], params.head_dim
        pieces = -(-columns // size)
        padded = np.zeros((len(x), pieces * size), dtype=np.float32)
        padded[:, :columns] = x
        averages = np.empty((params.heads, len(x), pieces * size), dtype=np.float32)
        for start in range(0, pieces * size, size):
            values = np.tile(padded[:, start : start + size], params.kv_heads)
            averages[:, :, start : start + size] = attend(values).reshape(len(x), params.heads, size).swapaxes(0, 1)
        shared = averages[:, :, :columns].reshape(params.kv_heads, -1, columns)
        if tensor not in self.averaged:
            empty = (np.zeros(columns), np.zeros((columns, columns), dtype=np.float32))
            self.averaged[tensor] = [Sums(*(array.copy() for array in empty)) for _ in shared]
        for sums, own in zip(self.averaged[tensor], shared, strict=True):
            sums.add(own)
            sums.add_products(own)

    def route(self, x: Floats, router: _Recorded, top_k: int, normalise: bool) -> tuple[Any, Any]:
        if (waiting := self._note(x, router)) is not None:
            waiting.add_products(x)
        return self.inner.route(x, router.inner, top_k, normalise)

    def experts(
        self,
        x: Floats,
        ids: Ints,
        weights: Floats,
        gate: Sequence[_Recorded],
        up: Sequence[_Recorded],
        down: Sequence[_Recorded],
        kind: str,
    ) -> Floats:
        y = np.zeros((len(x), x.shape[1]), dtype=np.float32)
        for expert in range(len(gate)):
            row, place = np.nonzero(ids == expert)
            if len(row):
                own = np.ascontiguousarray(x[row])
                inner = self.gated_activation(self.linear(own, gate[expert]), self.linear(own, up[expert]), kind)
                np.add.at(y, row, weights[row, place][:, None] * self.linear(inner, down[expert]))
        return y

    def _note(self, x: Floats, matrix: _Recorded) -> Sums | None:
        """Adds the inputs x of a matrix; the sums that still want the products of their columns."""
        key = matrix.tensor, matrix.expert
        sums, full = self.sums.get(key), self.full(matrix.tensor)
        if self._latest is not None and self._latest[0] is x:
            shared = self._latest[1]
            if sums is shared or (sums is None and (shared.products is not None or not full)):
                self.sums[key] = shared
                return None
        if sums is None:
            columns = x.shape[1]
            products = np.zeros((columns, columns), dtype=np.float32) if full else None
            sums = self.sums[key] = Sums(np.zeros(columns), products)
        sums.add(x)
        self._latest = x, sums
        return sums if sums.products is not None else None


def _inverse_squares(stream: Floats) -> Floats:
    """One over the mean square of each row, (T,)."""
    squares = np.mean(stream * stream, axis=1)
    return np.asarray(1 / np.maximum(squares, np.finfo(np.float32).tiny), dtype=np.float32)
