"""Operators that note what every weight is multiplied with, for calibration.

Attention averages values over positions before anything else sees them, so an error that they have in common counts in
full and one that differs from position to position hardly at all. What a value projection is really multiplied with is
therefore the attention's average of its inputs, another one for each head.
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


@dataclass
class Sums:
    """What has been summed over the inputs of a weight: `squares` (columns,) and `products` (columns, columns)."""

    squares: npt.NDArray[np.float64]
    products: Floats | None = None
    tokens: int = 0

    def add(self, x: Floats) -> None:
        """Takes the inputs x (T, columns)."""
        self.tokens += len(x)
        if self.products is None:
            self.squares += np.einsum("tc,tc->c", x, x, dtype=np.float64)
        else:
            products = x.T @ x
            self.products += products
            self.squares += products.diagonal()


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A matrix of the inner backend, and the tensor that it is (of); `expert` numbers those in one tensor."""

    inner: Any
    tensor: str
    expert: int


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
        self._latest: tuple[Floats, Sums] | None = None  # the latest input and where it was added
        self._products: deque[tuple[Floats, Floats, str]] = deque(maxlen=4)  # the latest (result, input, tensor)

    def begin(self, full: Callable[[str], bool]) -> None:
        """Forgets all sums. full: tensors of which the products of all pairs of columns are wanted, besides squares."""
        self.full = full
        self.sums, self.averaged = {}, {}

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
            self._products.clear()
            hidden, logits, *_ = forward(self.as_ops(), batch, cache)
            return Output(logits=logits, hidden=hidden)

        return step

    def embed(self, matrix: _Recorded, token_ids: Ints) -> Any:
        return self.inner.embed(matrix.inner, token_ids)

    def linear(self, x: Floats, matrix: _Recorded, bias: Floats | None = None) -> Any:
        self._note(x, matrix)
        result = self.inner.linear(x, matrix.inner, bias)
        self._products.append((result, x, matrix.tensor))
        return result

    def attention(
        self, q: Floats, k: Floats, v: Floats, cache: Any, layer: int, batch: Batch, params: AttentionParams
    ) -> Any:
        found = next(((x, tensor) for result, x, tensor in self._products if result is v), None)
        if found is not None:
            x, tensor = found
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

    def route(self, x: Floats, router: _Recorded, top_k: int, normalise: bool) -> tuple[Any, Any]:
        self._note(x, router)
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

    def _note(self, x: Floats, matrix: _Recorded) -> None:
        key = matrix.tensor, matrix.expert
        sums, full = self.sums.get(key), self.full(matrix.tensor)
        if self._latest is not None and self._latest[0] is x:
            shared = self._latest[1]
            if sums is shared or (sums is None and (shared.products is not None or not full)):
                self.sums[key] = shared
                return
        if sums is None:
            columns = x.shape[1]
            products = np.zeros((columns, columns), dtype=np.float32) if full else None
            sums = self.sums[key] = Sums(np.zeros(columns), products)
        sums.add(x)
        self._latest = x, sums
