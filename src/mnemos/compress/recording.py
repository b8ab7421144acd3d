"""Operators that note what every weight is multiplied with, for calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mnemos.contract import Batch, Floats, Ints, Output
from mnemos.formats.tensor import Tensor
from mnemos.ops.protocol import Forward, Ops, Rows


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

    tensors: the checkpoint's. full: tensors of which the products of all pairs of columns are wanted too, not only the
    squares. Weights that are multiplied with the same array share one `Sums`, as queries, keys and values do.
    """

    def __init__(self, inner: Ops, tensors: Mapping[str, Tensor], full: Callable[[str], bool]) -> None:
        self.inner = inner
        self.tensors = tensors
        self.full = full
        self.sums: dict[tuple[str, int], Sums] = {}  # by tensor and expert
        self._made: dict[str, int] = {}  # how many matrices were made of a tensor before
        self._latest: tuple[Floats, Sums] | None = None  # the latest input and where it was added

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
            return Output(logits=logits, hidden=hidden)

        return step

    def embed(self, matrix: _Recorded, token_ids: Ints) -> Any:
        return self.inner.embed(matrix.inner, token_ids)

    def linear(self, x: Floats, matrix: _Recorded, bias: Floats | None = None) -> Any:
        self._note(x, matrix)
        return self.inner.linear(x, matrix.inner, bias)

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
