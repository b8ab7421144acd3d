"""Adapters that stay beside the weights, so that every sequence of a batch can have another one, or none.

A weight W that an adapter changes becomes W x + scale * B (A x), where the second part is that of the sequence's own
adapter (Hu et al. 2021, arXiv:2106.09685; several in one batch: Chen et al. 2023, arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np

from mnemos.contract import Batch, Floats, Ints, Output
from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.adapters import Adapter
from mnemos.formats.tensor import Tensor
from mnemos.models.weights import Weights, without_prefix
from mnemos.ops.protocol import Array, Factors, Forward, Matrix, Ops, Rows


class Adapters:
    """The adapters of a model, by the names that requests choose them by. UnsupportedError for one that does more than
    to add products of two factors."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            if not adapter.is_plain:
                what = "replaces whole tensors" if adapter.whole else "rescales weights (DoRA)"
                raise UnsupportedError(f"{adapter.path}: adapter {name!r} {what}; it can only be merged into a model")
        self.names = tuple(adapters)
        self._adapters = tuple(adapters.values())
        self._pairs = [
            {without_prefix(module): pair for module, pair in one.pairs.items()} for one in adapters.values()
        ]

    @property
    def fingerprint(self) -> str:
        """A hash of all names and factors."""
        digest = sha256()
        for name, adapter in zip(self.names, self._adapters, strict=True):
            digest.update(repr((name, sorted(adapter.pairs))).encode())
            for module in sorted(adapter.pairs):
                pair = adapter.pairs[module]
                digest.update(repr(pair.scale).encode() + pair.a.tobytes() + pair.b.tobytes())
        return digest.hexdigest()

    def factors(
        self, module: str, shape: tuple[int, int], take: Rows | slice | None
    ) -> list[tuple[Floats, Floats] | None] | None:
        """What each adapter adds to the `take` rows of a module's weight: a (rank, columns) and b (rows, rank) with
        its scale, or None. None: no adapter changes it."""
        found: list[tuple[Floats, Floats] | None] = []
        for adapter, pairs in zip(self._adapters, self._pairs, strict=True):
            pair = pairs.get(module)
            if pair is None:
                found.append(None)
                continue
            own = len(pair.b), pair.a.shape[1]
            if own != shape:
                raise FormatError(
                    f"{adapter.path}: {module} has factors for a weight of shape {list(own)}; the model's "
                    f"is {list(shape)}"
                )
            b = pair.b if take is None else pair.b[take]
            found.append((pair.a, np.asarray(b * np.float32(pair.scale), dtype=np.float32)))
        return found if any(pair is not None for pair in found) else None

    def check_places(self, known: set[str]) -> None:
        """FormatError for an adapter of a module that is not one of the model's weights."""
        for adapter, pairs in zip(self._adapters, self._pairs, strict=True):
            for module in pairs:
                if module not in known:
                    raise FormatError(
                        f"{adapter.path}: changes {module}, which the model does not have; expected an adapter of "
                        f"this model{f' (it was trained on {adapter.base})' if adapter.base else ''}"
                    )


class AdaptedWeights(Weights):
    """Weights of which some carry the factors of adapters; `ops` are `AdaptedOps`, or None to check only."""

    def __init__(
        self,
        path: Path | str,
        tensors: Mapping[str, Tensor],
        ops: Ops | None,
        gguf_names: Mapping[str, str] | None,
        adapters: Adapters,
    ) -> None:
        super().__init__(path, tensors, ops, gguf_names)
        self._adapters = adapters
        self._modules: set[str] = set()

    def matrix(
        self, name: str, rows: int, columns: int, *, take: Rows | slice | None = None, transposed: bool = False
    ) -> Matrix:
        """See `Weights.matrix`."""
        matrix = super().matrix(name, rows, columns, take=take, transposed=transposed)
        self._modules.add(name)
        # GGUF keeps some rows in another order, which `take` undoes: then they are in the adapter's.
        restored = self.is_gguf and not isinstance(take, slice)
        pairs = self._adapters.factors(name, (rows, columns), None if restored else take)
        if pairs is None or self.ops is None:
            return matrix
        taken = next(len(pair[1]) for pair in pairs if pair is not None)
        return _Adapted(matrix, name, self.ops.factors(pairs, (taken, columns)))

    def finish(self, ignored: Sequence[str] = ()) -> None:
        """See `Weights.finish`; FormatError also for an adapter of what the model does not have."""
        super().finish(ignored)
        self._adapters.check_places(self._modules)


@dataclass(frozen=True, eq=False)
class _Adapted:
    """A backend's matrix, with the factors that adapters add to it."""

    matrix: Matrix
    module: str
    factors: Factors


class AdaptedOps:
    """The operators of `inner`, with each sequence's adapter added to its products; see `as_ops`."""

    def __init__(self, inner: Ops) -> None:
        self.inner = inner

    def as_ops(self) -> Ops:
        """This object as what a model is loaded with; what is not defined here is the inner backend's."""
        return cast(Ops, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def compile(self, forward: Forward, cache: Any) -> Callable[[Batch], Output]:
        """See `Ops.compile`."""

        def adapted(ops: Ops, batch: Any, cache: Any) -> tuple[Array, ...]:
            return forward(_StepOps(ops, batch), batch, cache)

        return self.inner.compile(adapted, cache)


class _StepOps:
    """The operators of one step."""

    def __init__(self, inner: Ops, batch: Any) -> None:
        self._inner = inner
        self._batch = batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        if not isinstance(matrix, _Adapted):
            return self._inner.linear(x, matrix, bias)
        y = self._inner.linear(x, matrix.matrix, bias)
        return self._inner.add_low_rank(y, x, matrix.factors, self._batch)

    def embed(self, matrix: Matrix, token_ids: Ints) -> Array:
        return self._inner.embed(_plain(matrix), token_ids)

    def route(self, x: Array, router: Matrix, top_k: int, normalise: bool) -> tuple[Array, Array]:
        return self._inner.route(x, _plain(router), top_k, normalise)


def _plain(matrix: Matrix) -> Matrix:
    """A matrix that is not multiplied with as in `linear`, and can therefore not carry an adapter."""
    if isinstance(matrix, _Adapted):
        raise UnsupportedError(
            f"an adapter changes {matrix.module}, which is no plain projection; it can only be merged into the model"
        )
    return matrix
