"""Building blocks with a key/value cache for your own PyTorch models: `KVCache` and `CachedAttention`."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.errors import ConfigError
from mnemos.ops.torch import usable_device
from mnemos.rules import COUNT, real

_SHARE = real(0, 1)


class KVCache:
    """Keys and values of every layer, each (batch, heads, time, head_dim).

    With sizes given, the tensors are allocated at once and `update` writes into them; `KVCache.growing()` takes its
    sizes from the first update and grows, as `KVCache(max_batch_size, max_seq_len)` does up to these limits. After all
    layers of a step are updated, call `increment_length`.
    """

    max_length: int | None
    max_batch_size: int | None
    max_seq_len: int | None
    keys: list[Tensor]
    values: list[Tensor]

    @overload
    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None: ...
    @overload
    def __init__(self, max_batch_size: int, max_seq_len: int) -> None: ...

    def __init__(self, *values: Any, **named: Any) -> None:
        """All sizes; or max_batch_size and max_seq_len alone, for a cache that grows up to these limits.

        dtype: by default that of the first keys, float32 before them.
        """
        limits = ("max_batch_size", "max_seq_len")
        if len(values) + len(named) == 2 and set(named) <= set(limits[len(values) :]):
            self._limit(**dict(zip(limits, values, strict=False)), **named)
            return
        names = ("num_layers", "batch_size", "num_heads", "head_dim", "max_length", "device", "dtype")
        given = {**dict(zip(names, values, strict=False)), **named}
        missing = [name for name in names[:5] if name not in given]
        unknown = [name for name in given if name not in names]
        if missing or unknown or len(values) > len(names) or len(given) < len(values) + len(named):
            what = f"lacks {', '.join(missing)}" if missing else f"got {', '.join(unknown) or 'a value twice'}"
            raise ConfigError(f"KVCache {what}; give {', '.join(names[:5])}, or max_batch_size and max_seq_len alone")
        self._allocate(**given)

    def _limit(self, max_batch_size: int | None, max_seq_len: int | None) -> None:
        for name, limit in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
            if limit is not None:
                COUNT.apply(name, limit)
        self.max_length, self.length = None, 0
        self.keys, self.values = [], []
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.device = torch.device("cpu")

    def _allocate(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        max_length: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = dict(
            num_layers=num_layers, batch_size=batch_size, num_heads=num_heads, head_dim=head_dim, max_length=max_length
        )
        for name, size in sizes.items():
            COUNT.apply(name, size)
        self.max_length = self.max_seq_len = max_length
        self.max_batch_size = batch_size
        self.device = usable_device(str(device))
        self.length = 0
        shape = (batch_size, num_heads, max_length, head_dim)
        self._follows = dtype is None
        dtype = dtype or torch.float32
        self.keys = [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(num_layers)]

    @classmethod
    def growing(cls, max_batch_size: int | None = None, max_seq_len: int | None = None) -> KVCache:
        """A cache without sizes: layers, batch and length follow the updates, at most up to these limits."""
        cache = cls.__new__(cls)
        cache._limit(max_batch_size, max_seq_len)
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
        if not all(isinstance(new, Tensor) and new.dim() == 4 for new in (key, value)):
            found = [tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__ for new in (key, value)]
            raise ConfigError(
                f"key {found[0]} and value {found[1]} do not fit the cache: expected (batch, heads, new "
                "positions, head_dim)"
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
        held = self._fitting(layer_idx, key, value)
        if end > self.max_length:
            raise ConfigError(f"the cache holds {self.max_length} positions; {end} are needed: make max_length larger")
        held[:, :, self.length : end] = key
        self.values[layer_idx][:, :, self.length : end] = value
        return held[:, :, :end], self.values[layer_idx][:, :, :end]

    def _fitting(self, layer_idx: int, key: Tensor, value: Tensor) -> Tensor:
        """A layer's keys, of the dtype of new ones. ConfigError where the two differ in dtype or device."""
        held = self.keys[layer_idx]
        if self._follows and self.length == 0 and key.dtype == value.dtype != held.dtype:
            held = self.keys[layer_idx] = held.to(key.dtype)
            self.values[layer_idx] = self.values[layer_idx].to(key.dtype)
        for name, new in (("key", key), ("value", value)):
            if (new.dtype, new.device) != (held.dtype, held.device):
                raise ConfigError(
                    f"{name} is {new.dtype} on {new.device} and the cache {held.dtype} on {held.device}; create the "
                    "cache with the model's dtype and device"
                )
        return held

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
    query sees every key, as in torch.nn.MultiheadAttention.

    `mask` is boolean or of zeros and ones, True where a query may look, or other floats, which are added to the scores.
    Its shape is (queries, keys), (batch, queries, keys), one broadcastable to (batch, heads, queries, keys), or (batch,
    keys) where the batch is not as large as queries or keys are many. With a cache, keys are all positions so far, or
    the new ones alone, before which all is seen; queries are the new positions, or all, of which the last rows count. A
    mask that says nothing of single queries is combined with causality. ConfigError for any other shape. Source:
    Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ConfigError(f"d_model is {d_model}; expected a multiple of num_heads, {num_heads}")
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.dropout = float(_SHARE.apply("dropout", dropout))
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

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        width = self.num_heads * self.head_dim
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 3 or x.shape[2] != width or x.shape[0] != query.shape[0] or x.shape[1] < 1:
                raise ConfigError(f"{name} is {tuple(x.shape)}; expected ({query.shape[0]}, time, {width})")
        if key.shape[1] != value.shape[1]:
            raise ConfigError(f"value has {value.shape[1]} positions and key {key.shape[1]}; expected as many")

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, use_cache: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(output (batch, time, d_model), cache): cache: (keys, values), each (batch, heads, time, head_dim)."""
        self._check(query, key, value)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        use_cache = use_cache or self.always_cache
        new = k.shape[2]
        if use_cache:
            if self.cache is not None:
                if self.cache[0].shape[0] != k.shape[0]:
                    raise ConfigError(
                        f"query has a batch of {k.shape[0]} and the cache one of {self.cache[0].shape[0]}; call "
                        "reset_cache() before another batch"
                    )
                k, v = torch.cat((self.cache[0], k), dim=2), torch.cat((self.cache[1], v), dim=2)
            self.cache = (k, v)
        if mask is not None:
            mask = _fit_mask(mask, q, k.shape[2], new)
        causal = use_cache and new == q.shape[2] > 1  # keys of another length are another text's
        if causal and (mask is None or mask.shape[-2] == 1):
            positions = torch.arange(k.shape[2], device=q.device)
            mask = _both(positions[None, :] <= positions[-q.shape[2] :, None], mask)
        if use_cache and self.real is not None:
            mask = _both(self.real[:, None, None, :], mask)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(attended.transpose(1, 2).reshape(query.shape))
        return output, self.cache if use_cache else None


def _fit_mask(mask: Tensor, q: Tensor, keys: int, new: int) -> Tensor:
    """A caller's mask as a boolean or additive one broadcastable to (batch, heads, queries, keys); see the class."""
    batch, heads, queries = q.shape[:3]
    shape = tuple(mask.shape)
    if mask.dtype != torch.bool:
        flags = (mask == 0) | (mask == 1)
        if not mask.is_floating_point() or bool(flags.all() and (mask == 1).any()):
            if not flags.all():
                raise ConfigError("mask is of whole numbers other than 0 and 1; expected 1 where a query may look")
            mask = mask == 1
    if mask.dim() == 2 and mask.shape[0] not in (1, queries, keys) and mask.shape[0] == batch:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dim() == 4 and queries < mask.shape[2] == keys:
        mask = mask[:, :, -queries:]
    if mask.dim() == 4 and mask.shape[3] == new < keys:
        mask = F.pad(mask, (keys - new, 0), value=mask.dtype == torch.bool)
    wanted = (batch, heads, queries, keys)
    if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, wanted, strict=True)):
        raise ConfigError(
            f"mask is {shape}; expected ({queries}, {keys}), ({batch}, {keys}), ({batch}, {queries}, {keys}), or "
            f"broadcastable to {wanted}"
        )
    return mask


def _both(shown: Tensor, mask: Tensor | None) -> Tensor:
    """What a boolean mask and another one, if there is one, let through."""
    if mask is None:
        return shown
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, float("-inf"))
