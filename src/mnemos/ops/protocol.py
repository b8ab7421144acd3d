"""The operators that architectures are written with.

`Array` is a backend's own array of float32 activations, (rows, columns); `Matrix` its own form of a weight.
Every backend is tested against `mnemos.ops.numpy`, operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mnemos.contract import Batch, Cache, Floats, KVLayout, Output
from mnemos.formats.quantized_rows import QuantizedRows
from mnemos.formats.tensor import Tensor

Array = Any
Rows = npt.NDArray[np.intp]
Matrix = Any
Factors = Any  # a backend's own form of the factors of adapters
Bank = Any  # a backend's own form of a memory bank's keys and values
Forward = Callable[[Any, Any, Any], tuple[Array, ...]]  # (ops, batch, cache) -> (hidden, logits, *early logits)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh")


@dataclass(frozen=True, eq=False)
class RopeParams:
    """Rotary embedding in the half-split ("neox") order: element i is paired with element i + rotary_dim / 2.

    `frequencies` (rotary_dim / 2,) float32, radians/position; `magnitude` multiplies both functions (YaRN, LongRoPE).
    The elements of a head after rotary_dim pass unchanged. Source: Su et al. 2021, arXiv:2104.09864.
    """

    head_dim: int
    rotary_dim: int
    frequencies: Floats
    magnitude: float = 1.0


@dataclass(frozen=True)
class AttentionParams:
    """Causal grouped-query attention. Query i sees a cached key j when j <= i and, with a window, i - j < window."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # 0: no limit
    softcap: float = 0.0  # 0: none; else scores become cap * tanh(scores / cap)
    rope: RopeParams | None = None  # by which queries and keys are rotated, see `Recall.farthest`


@dataclass(frozen=True)
class MemoryParams:
    """Attention to a bank of `rows` keys and values, divided into `chapters` of equal length; 0: undivided.

    The first `shared` chapters are always read, the others where they are chosen, with their weights times `scaling`.
    separate: each chosen chapter has a softmax of its own. If not, all chapters of a row, the shared ones with weight
    1, have one together; the weights are divided by their sum, and each multiplies its chapter's keys and values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rows: int
    chapters: int = 0
    shared: int = 0
    scaling: float = 1.0
    separate: bool = False


@dataclass(frozen=True)
class BankSource:
    """What the keys and values of a bank are made of: vectors, and the matrices that project them.

    rows: the vectors (N, width), as stored. keys, values: (kv_heads * head_dim, width). norm: "", "rms" or "layernorm",
    by which each vector is normalized by itself first, with `epsilon`; factor multiplies all.
    """

    rows: Tensor | QuantizedRows
    keys: Floats
    values: Floats
    norm: str = ""
    epsilon: float = 0.0
    factor: float = 1.0

    def projected(self, count: int) -> tuple[Floats, Floats]:
        """Keys and values (count, kv_heads * head_dim) of the first `count` vectors."""
        rows = (self.rows.dequantize() if isinstance(self.rows, Tensor) else self.rows.values())[:count]
        if self.norm == "layernorm":
            rows = rows - rows.mean(axis=1, keepdims=True)
        if self.norm:
            squares = np.mean(rows.astype(np.float64) ** 2, axis=1, keepdims=True)
            rows = np.asarray(rows / np.sqrt(squares + self.epsilon), dtype=np.float32)
        rows = rows * np.float32(self.factor)
        return rows @ self.keys.T, rows @ self.values.T


@dataclass(frozen=True)
class PoolParams:
    """By what a router chooses for a row; `window` is a number of positions.

    For a prompt, whose rows begin at position 0 and are all of it, each row gets the same: the mean of all rows
    ("sequence", "hybrid"), of the last `window` ("rolling"), or over all rows of the mean of the `window` up to each
    ("sequence-rolling"). After it, a row gets the mean of the `window` positions up to its own ("rolling",
    "hybrid") or itself.
    """

    kind: str
    window: int

    @property
    def remembers(self) -> bool:
        """Whether a sequence's latest rows have to be kept."""
        return self.kind in ("rolling", "hybrid")


class Windows(Protocol):
    """For each state slot, the rows at a sequence's latest positions, for some layers; see `StatefulModel`."""

    def reserve(self, slots: int) -> None: ...

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...

    def clear(self, slots: Sequence[int]) -> None: ...


class Ops(Protocol):
    """The operators of one backend. An architecture calls nothing else on arrays, and never asks which backend it has.

    Arrays are (rows, width) float32 unless said otherwise, in the backend's own form: one row for each token of the
    batch, whichever sequence it belongs to. Results of a row do not depend on the other rows.
    """

    name: str
    cache_dtype: str  # for a cache without a requested type: "float16" or "bfloat16"

    # Parameters, created once at load.
    def matrix(self, tensor: Tensor, rows: Rows | None = None) -> Matrix:
        """A (rows, columns) weight, or its `rows` in this order, in the form that this backend multiplies fastest."""

    def factors(self, pairs: Sequence[tuple[Floats, Floats] | None], shape: tuple[int, int]) -> Factors:
        """What each adapter adds to a weight of this shape (rows, columns): b @ a, with a (rank, columns) and
        b (rows, rank); None: nothing."""

    def vector(self, tensor: Tensor) -> Array:
        """A norm weight or bias, float32, flat."""

    def weight_memory(self, tensors: Iterable[Tensor]) -> int | None:
        """Bytes of the machine's memory that these will take as parameters, so that a load that must fail is refused
        before it begins; None if the backend cannot tell."""

    def finish(self) -> None:
        """Called when all parameters exist; reads deferred ones now. Another thread may call it."""

    def cache(self, layout: KVLayout, pages: int | Sequence[int]) -> Cache:
        """A cache with this many pages in each of the layout's groups, or these many."""

    def bank(self, source: BankSource, params: MemoryParams) -> Bank:
        """The keys and values of the source's first `params.rows` vectors, in the form that is attended to fastest.

        A backend may make them when they are first read, and in fewer bytes where the vectors are quantized.
        """

    def windows(self, layers: int, width: int, length: int) -> Windows:
        """Room for the rows (width,) at the latest `length` positions of each of `layers`."""

    def compile(self, forward: Forward, cache: Any) -> Callable[[Batch], Output]:
        """Turns an architecture's `forward(ops, batch, cache) -> (hidden, logits)` into a step on NumPy batches.

        What it returns after the logits becomes the output's `early`.

        A backend may run `forward` at each step or record it once and replay it: `forward` must therefore not depend on
        the batch's content, and must do nothing but call ops on arrays.
        """

    # Operators. x is (T, columns).
    def embed(self, matrix: Matrix, token_ids: Array) -> Array:
        """Rows of `matrix`, (T, columns)."""

    def rows(self, x: Array, index: Array) -> Array:
        """The rows of x at `index` (R,)."""

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        """x @ matrix.T + bias: (T, matrix rows)."""

    def add_low_rank(self, y: Array, x: Array, factors: Factors, batch: Any) -> Array:
        """y + b @ (a @ x) with the factors of each row's adapter (`Batch.adapters`); rows without one stay as they are.

        y is used up: nothing else may read it. Hu et al. 2021, arXiv:2106.09685.
        """

    def rms_norm(self, x: Array, weight: Array, epsilon: float) -> Array:
        """Each group of len(weight) columns divided by its root mean square, times weight.

        len(weight) may be a divisor of the columns: then each head is normalised separately. Zhang & Sennrich 2019.
        """

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, epsilon: float) -> Array: ...

    def rope(self, x: Array, positions: Array, params: RopeParams) -> Array:
        """Rotates each head of x (T, heads * head_dim) by its row's position."""

    def attention(
        self, q: Array, k: Array, v: Array, cache: Any, layer: int, batch: Any, params: AttentionParams
    ) -> Array:
        """Stores k and v of the new positions in the cache's pages; each row then attends to the positions that the
        pages of its sequence hold, up to its own position and within the window."""

    def activation(self, x: Array, kind: str) -> Array:
        """kind is one of ACTIVATIONS; gelu is the exact (erf) form."""

    def gated_activation(self, gate: Array, up: Array, kind: str) -> Array:
        """activation(gate) * up."""

    def add(self, x: Array, y: Array) -> Array: ...

    def scale(self, x: Array, factor: float) -> Array: ...

    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""

    def route(self, x: Array, router: Matrix, top_k: int, normalise: bool) -> tuple[Array, Array]:
        """Experts of each row: (ids (T, top_k), weights (T, top_k)), most probable first, ties to the lower id.

        Weights are softmax probabilities over all experts; with `normalise` they are divided by their sum.
        """

    def choose(self, logits: Array, top_k: int) -> tuple[Array, Array]:
        """The largest logits of each row as ids and weights (T, top_k), the largest first, ties to the lower id.

        Weights are softmax probabilities divided by their sum.
        """

    def pool_rows(self, x: Array, batch: Any, windows: Any, layer: int, params: PoolParams) -> Array:
        """What `params` says each row of x is routed by, (T, columns), and keeps in `windows` what later rows need.

        layer: counted among the layers of `windows`, which is None if nothing is remembered.
        """

    def memory_attention(
        self, q: Array, bank: Bank, ids: Array | None, weights: Array | None, params: MemoryParams
    ) -> Array:
        """q (T, heads * head_dim) attends to the bank's keys and values, whatever its position.

        ids and weights (T, k): the chosen chapters, counted after the shared ones; None: the whole bank is read.
        """

    def experts(
        self,
        x: Array,
        ids: Array,
        weights: Array,
        gate: Sequence[Matrix],
        up: Sequence[Matrix],
        down: Sequence[Matrix],
        kind: str,
    ) -> Array:
        """Sum over a row's experts e of weight * down[e](activation(gate[e](x)) * up[e](x)), in the order of ids."""
