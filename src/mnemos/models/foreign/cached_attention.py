"""Building blocks with a key/value cache for your own PyTorch models: `KVCache` and `CachedAttention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.errors import ConfigError
from mnemos.rules import COUNT


class KVCache:
    """Keys and values of every layer, each (batch, heads, time, head_dim).

    With sizes given, the tensors are allocated at once and `update` writes into them; `KVCache.growing()` takes its
    sizes from the first update and grows. After all layers of a step are updated, call `increment_length`.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = dict(
            num_layers=num_layers, batch_size=batch_size, num_heads=num_heads, head_dim=head_dim, max_length=max_length
        )
        for name, size in sizes.items():
            COUNT.apply(name, size)
        self.max_length: int | None = max_length
        self.max_batch_size: int | None = batch_size
        self.max_seq_len: int | None = max_length
        self.device = torch.device(device)
        self.length = 0
        shape = (batch_size, num_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(num_layers)]

    @classmethod
    def growing(cls, max_batch_size: int | None = None, max_seq_len: int | None = None) -> KVCache:
        """A cache without sizes: layers, batch and length follow the updates, at most up to these limits."""
        cache = cls.__new__(cls)
        cache.max_length, cache.length, cache.keys, cache.values = None, 0, [], []
        cache.max_batch_size, cache.max_seq_len = max_batch_size, max_seq_len
        cache.device = torch.device("cpu")
        return cache

    @staticmethod
    def bytes(
        num_layers: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        bytes_per_value: int = 2,
        batch_size: int = 1,
    ) -> int:
        """Size of a cache: 2 (keys, values) x layers x length x key/value heads x head_dim x bytes a value x batch."""
        return 2 * num_layers * max_length * num_kv_heads * head_dim * bytes_per_value * batch_size

    def update(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key and value (batch, heads, new, head_dim) from `length` on; returns all, the new ones included."""
        if not key.dim() == value.dim() == 4:
            raise ConfigError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit the cache: expected "
                "(batch, heads, new positions, head_dim)"
            )
        end = self.length + key.shape[2]
        if self.max_length is None:
            return self._grow(layer_idx, key, value)
        if not 0 <= layer_idx < len(self.keys):
            raise ConfigError(f"layer_idx is {layer_idx}; the cache has layers 0 to {len(self.keys) - 1}")
        held = self.keys[layer_idx]
        if key.shape != value.shape or (key.shape[0], key.shape[1], key.shape[3]) != (
            held.shape[0], held.shape[1], held.shape[3]
        ):  # fmt: skip
            raise ConfigError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit the cache: expected "
                f"({held.shape[0]}, {held.shape[1]}, new positions, {held.shape[3]})"
            )
        if end > self.max_length:
            raise ConfigError(f"the cache holds {self.max_length} positions; {end} are needed: make max_length larger")
        held[:, :, self.length : end] = key
        self.values[layer_idx][:, :, self.length : end] = value
        return held[:, :, :end], self.values[layer_idx][:, :, :end]

    def _grow(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        for name, limit, size in (
            ("max_batch_size", self.max_batch_size, key.shape[0]),
            ("max_seq_len", self.max_seq_len, end),
        ):
            if limit is not None and size > limit:
                raise ConfigError(f"{name} of the cache is {limit}; {size} are needed: make it larger")
        if layer_idx == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        elif 0 <= layer_idx < len(self.keys):
            for tensors, new in ((self.keys, key), (self.values, value)):
                held = tensors[layer_idx]
                held = held if held.shape[2] == self.length else held[:, :, : self.length]
                tensors[layer_idx] = torch.cat((held, new), dim=2)
        else:
            raise ConfigError(f"layer_idx is {layer_idx}; a growing cache takes layers in order, next {len(self.keys)}")
        return self.keys[layer_idx], self.values[layer_idx]

    def increment_length(self, length: int = 1) -> None:
        """Counts `length` new positions as stored, once all layers have them."""
        if length < 0 or (self.max_length is not None and self.length + length > self.max_length):
            raise ConfigError(f"length {self.length} + {length} is not within 0 to {self.max_length}")
        self.length += length

    def reset(self) -> None:
        """Starts over at position 0; the tensors stay."""
        self.length = 0
        if self.max_length is None:
            self.keys, self.values = [], []

    def clear(self) -> None:
        """Starts over and erases what was stored."""
        self.reset()
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def get_seq_length(self) -> int:
        return self.length

    def leaves(self) -> list[Tensor]:
        """Keys and values of all layers in turn, each (batch, heads, length, head_dim)."""
        return [t[:, :, : self.length] for pair in zip(self.keys, self.values, strict=True) for t in pair]

    def fill(self, leaves: list[Tensor], length: int) -> None:
        """Takes over tensors as `leaves` gives them."""
        self.keys, self.values, self.length = list(leaves[::2]), list(leaves[1::2]), length


class CachedAttention(nn.Module):
    """Multi-head attention that can keep its keys and values between calls.

    query, key, value: (batch, time, d_model). With `use_cache=True` new keys and values are appended to `cache`, and
    the queries, taken as the newest positions, attend causally to all of them. Without it and without a `mask` every
    query sees every key, as in torch.nn.MultiheadAttention. `mask` (broadcastable to (batch, heads, queries, keys)) is
    boolean, True where a query may look, or added to the scores. Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ConfigError(f"d_model is {d_model}; expected a multiple of num_heads, {num_heads}")
        self.num_heads, self.head_dim, self.dropout = num_heads, d_model // num_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.cache: tuple[Tensor, Tensor] | None = None
        self.always_cache = False  # set by the engine while it drives the module, as is `real`:
        self.real: Tensor | None = None  # (batch, time so far) bool, False where a cached position is padding

    def reset_cache(self) -> None:
        """Forgets the keys and values of earlier calls."""
        self.cache = None

    def drive(self, real: Tensor | None) -> None:
        """Makes the calls that follow use the cache, with `real` telling real positions from padding."""
        self.always_cache, self.real = True, real

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, use_cache: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(output (batch, time, d_model), cache): cache: (keys, values), each (batch, heads, time, head_dim)."""
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        use_cache = use_cache or self.always_cache
        if use_cache:
            if self.cache is not None:
                k, v = torch.cat((self.cache[0], k), dim=2), torch.cat((self.cache[1], v), dim=2)
            self.cache = (k, v)
            if mask is not None and mask.shape[-1] != k.shape[2]:
                mask = None  # made for the new positions alone; causality below covers them
            if mask is None and q.shape[2] > 1:
                positions = torch.arange(k.shape[2], device=q.device)
                mask = positions[None, :] <= positions[-q.shape[2] :, None]
            if self.real is not None:
                shown = self.real[:, None, None, :]
                if mask is None or mask.dtype == torch.bool:
                    mask = shown if mask is None else mask & shown
                else:
                    mask = mask.masked_fill(~shown, float("-inf"))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(attended.transpose(1, 2).reshape(query.shape))
        return output, self.cache if use_cache else None
