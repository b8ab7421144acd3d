"""Reading memory over operators: a bank's keys and values made once, a router, and attention to the chosen chapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mnemos.contract import Floats
from mnemos.formats.quantized_rows import QuantizedRows
from mnemos.formats.tensor import Tensor
from mnemos.models.blocks import only
from mnemos.models.memory_transformer.config import Config
from mnemos.models.weights import Linear, Weights
from mnemos.ops.protocol import Array, Bank, BankSource, MemoryParams, Ops, PoolParams, Windows

SPARE_POSITIONS = 64  # that a sequence's window keeps beyond those that are averaged: it may return by so many


@dataclass
class Routing:
    """How a model's routers go with the engine.

    pooled: they see a prompt as a whole; remembers: and later the latest positions, which `windows` hold.
    """

    pooled: bool
    remembers: bool
    windows: Windows | None = None

    @property
    def promises(self) -> dict[str, Any]:
        """Fields of ModelSpec. After the prompt, every row is routed by itself or by the window up to it."""
        if not self.pooled:
            return {}
        kept = {"states": True, "rewind_limit": SPARE_POSITIONS} if self.remembers else {}
        return {"pools_prompts": True, "chunks": False, "shares_prefixes": False, **kept}


@dataclass(frozen=True)
class Router:
    """Chooses chapters for rows: for each by itself, or by what `pool_rows` says."""

    linear: Linear
    top_k: int
    pool: PoolParams | None
    routing: Routing
    place: int  # among the layers of the windows

    def __call__(self, ops: Ops, states: Array, batch: Any, wanted: Array | None) -> tuple[Array, Array]:
        if self.pool is not None:
            states = ops.pool_rows(states, batch, self.routing.windows, self.place, self.pool)
        return ops.choose(self.linear(ops, only(ops, states, wanted)), self.top_k)


@dataclass(frozen=True)
class MemoryReader:
    """Attention from x to a bank's keys and values. `queries` and `outputs`: one projection, or two."""

    queries: tuple[Linear, ...]
    outputs: tuple[Linear, ...]
    bank: Bank
    params: MemoryParams
    router: Router | None

    def __call__(self, ops: Ops, x: Array, states: Array, batch: Any, wanted: Array | None) -> Array:
        """x: the rows that read; states: all rows that the router sees, of which `wanted` read."""
        ids, weights = (None, None) if self.router is None else self.router(ops, states, batch, wanted)
        for projection in self.queries:
            x = projection(ops, x)
        x = ops.memory_attention(x, self.bank, ids, weights, self.params)
        for projection in self.outputs:
            x = projection(ops, x)
        return x


@dataclass
class ReaderLoader:
    """Makes the readers of a model's memory layers, whose banks several may share. FormatError: tensors do not fit.

    shape: heads, key/value heads and head width of memory attention.
    """

    config: Config
    weights: Weights
    hidden: int
    shape: tuple[int, int, int]
    layers: Mapping[int, int]  # the bank of each memory layer
    routing: Routing
    _products: dict[int, Tensor] = field(default_factory=dict)  # factorized banks, multiplied out

    @classmethod
    def of(
        cls, config: Config, weights: Weights, hidden: int, heads: tuple[int, int | None], layers: int
    ) -> ReaderLoader:
        """For a model with `layers` layers and these heads of self-attention."""
        settings = config.memory
        banks, count = settings.banks(layers)
        for unread in set(range(count)) - set(banks.values()):
            for name in (f"memory_banks.{unread}", f"memory_banks.{unread}.base_bank"):
                weights.used |= {name + suffix for suffix in (".memory", ".A", ".B", ".quantized_memory", ".scales")}
        pool = _pool_of(config)
        routing = Routing(pool is not None and bool(banks), pool is not None and pool.remembers)
        if routing.pooled and routing.remembers and pool is not None and weights.ops is not None:
            routing.windows = weights.ops.windows(len(banks), hidden, pool.window + SPARE_POSITIONS)
        return cls(config, weights, hidden, config.attention_shape(*heads, hidden), banks, routing)

    def load(self, layer: int, name: str) -> MemoryReader:
        """The reader of a layer whose memory attention has this name, such as `layers.3.memory_attn`."""
        heads, kv_heads, head_dim = self.shape
        settings, weights = self.config.memory, self.weights
        width = self.config.bank_width(self.hidden)
        rank = settings.projection_rank if settings.use_low_rank_projections and not settings.is_reduced else None
        shared = settings.num_shared_chapters
        by_chapter = settings.use_chapters and settings.routed > 0
        params = MemoryParams(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rows=settings.num_memory_tokens,
            chapters=settings.num_chapters if by_chapter else 0,
            shared=shared if by_chapter else 0,
            scaling=settings.routed_scaling_factor,
            separate=by_chapter and settings.routing_strategy_inference == "token",
        )
        number = self.layers[layer]
        rows = self._read_bank(number, width)
        keys, values = (self._product(f"{name}.{side}", kv_heads * head_dim, width, rank) for side in "kv")
        factor = 1.0
        if settings.use_chapters and not by_chapter:  # the shared chapters are all that is read
            read = shared * (settings.num_memory_tokens // settings.num_chapters)
            params = MemoryParams(heads, kv_heads, head_dim, params.scale, read)
            factor = 1.0 if settings.routing_strategy_inference == "token" else 1 / shared
        bank = None
        if weights.ops is not None and rows is not None and keys is not None and values is not None:
            norm = settings.shared_routed_norm_type if settings.normalizes else ""
            source = BankSource(rows, keys, values, norm, settings.shared_routed_norm_eps, factor)
            bank = weights.ops.bank(source, params)
        return MemoryReader(
            queries=self._projections(f"{name}.q", heads * head_dim, self.hidden, rank),
            outputs=self._projections(f"{name}.o", self.hidden, heads * head_dim, rank),
            bank=bank,
            params=params,
            router=self._router(layer) if settings.use_chapters else None,
        )

    def _router(self, layer: int) -> Router | None:
        """The router, without its rows for shared chapters, which are not chosen from."""
        settings, name = self.config.memory, f"routers.{layer}.router"
        chosen = slice(settings.num_shared_chapters, settings.num_chapters)
        if not settings.routed:
            self.weights.linear(name, settings.num_chapters, self.hidden, True)  # it has one all the same
            return None
        linear = self.weights.linear(name, settings.num_chapters, self.hidden, True, take=chosen)
        return Router(linear, settings.routed, _pool_of(self.config), self.routing, sorted(self.layers).index(layer))

    def _projections(self, name: str, rows: int, columns: int, rank: int | None) -> tuple[Linear, ...]:
        if rank is None:
            return (self.weights.linear(f"{name}_proj", rows, columns),)
        return self.weights.linear(f"{name}_down", rank, columns), self.weights.linear(f"{name}_up", rows, rank)

    def _product(self, name: str, rows: int, columns: int, rank: int | None) -> Floats | None:
        """The matrix (rows, columns) of one projection, or of two after each other; None where nothing is read."""
        shapes = {"_proj": (rows, columns)} if rank is None else {"_up": (rows, rank), "_down": (rank, columns)}
        tensors = [self.weights.tensor(name + suffix, shape) for suffix, shape in shapes.items()]
        if self.weights.ops is None:
            return None
        product, *rest = (tensor.dequantize() for tensor in tensors)
        for factor in rest:
            product = product @ factor
        return np.asarray(product)

    def _read_bank(self, number: int, width: int) -> Tensor | QuantizedRows | None:
        """The vectors of a bank (N, width) as stored; None where nothing is read."""
        settings, weights = self.config.memory, self.weights
        name = f"memory_banks.{number}" + (".base_bank" if settings.use_chapters else "")
        tokens, reads = settings.num_memory_tokens, weights.ops is not None
        if weights.has(name, ".quantized_memory"):
            scales = weights.tensor(name, (tokens,), ".scales")
            codes = weights.codes(name, ".quantized_memory", tokens, (width, width // 2))
            bits = 8 if codes.shape[1] == width else 4
            return QuantizedRows(codes, scales.dequantize(), bits) if reads else None
        if not settings.is_factorized:
            tensor = weights.tensor(name, (tokens, width), ".memory")
            return tensor if reads else None
        a = weights.tensor(name, (tokens, settings.memory_rank), ".A")
        b = weights.tensor(name, (width, settings.memory_rank), ".B")
        if reads and number not in self._products:
            self._products[number] = Tensor.from_array(a.name, a.dequantize() @ b.dequantize().T)
        return self._products.get(number)


def _pool_of(config: Config) -> PoolParams | None:
    """By what routers choose; None: for each row by itself, or no routing."""
    settings = config.memory
    kind = settings.routing_strategy_inference
    if not settings.use_chapters or not settings.routed or kind == "token":
        return None
    return PoolParams(kind, settings.routing_window_size)
