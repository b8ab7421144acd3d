"""The operators through PyTorch: CPU, CUDA and Apple's MPS, in float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemos.contract import Batch, Floats, KVLayout, Output
from mnemos.errors import ConfigError, UnsupportedError
from mnemos.formats.tensor import Tensor as StoredTensor
from mnemos.formats.tensor_types import TensorType
from mnemos.ops.protocol import AttentionParams, BankSource, Forward, MemoryParams, PoolParams, RopeParams, Rows
from mnemos.ops.torch_batch import Together, TorchBatch
from mnemos.ops.torch_graphs import DecodeGraphs
from mnemos.ops.torch_memory import TorchWindows, attend_memory, pooled_rows

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORDS = ("cuda",)  # devices whose steps are recorded
_STORED = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def best_device() -> str:
    """cuda if available, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(name: str) -> torch.device:
    """The device with that name; "auto": the best one. ConfigError if PyTorch does not know it or has none here."""
    try:
        device = torch.device(best_device() if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {name!r}, which PyTorch cannot use here: {reason}; expected 'cpu' or 'auto'"
        ) from error
    return device


class TorchCache:
    """Pages of keys and values on the device, by group (layers, 2, pages + 1, page_size, kv_heads, head_dim).

    No table names the last page; see `torch_graphs`.
    """

    def __init__(self, layout: KVLayout, pages: int | Sequence[int], device: torch.device) -> None:
        if layout.dtype not in TORCH_DTYPES:
            raise UnsupportedError(
                f"kv_dtype {layout.dtype!r} is not supported here; expected one of {', '.join(TORCH_DTYPES)}"
            )
        if layout.recall is not None:
            raise UnsupportedError("memory is not supported with backend 'torch'; expected 'native' or 'numpy'")
        self.layout = layout
        self.pages = layout.counts(pages)
        page = (layout.page_size, layout.kv_heads, layout.head_dim)
        self.values = [
            torch.zeros((len(group.layers), 2, count + 1, *page), dtype=TORCH_DTYPES[layout.dtype], device=device)
            for group, count in zip(layout.groups, self.pages, strict=True)
        ]

    def copy(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        values = self.values[group]
        values[:, :, list(targets)] = values[:, :, list(sources)]

    def read(self, page: int, group: int = 0) -> npt.NDArray[np.uint8]:
        return np.asarray(self.values[group][:, :, page].contiguous().cpu().view(torch.uint8).numpy()).reshape(-1)

    def write(self, page: int, content: npt.NDArray[np.uint8], group: int = 0) -> None:
        target = self.values[group][:, :, page]
        target.copy_(torch.from_numpy(np.array(content)).view(target.dtype).reshape(target.shape))


class TorchOps:
    """device: "auto" uses the best one; dtype: that of weights and activations, auto: bfloat16, on a CPU float32."""

    name = "torch"

    def __init__(self, device: str = "auto", dtype: str = "auto") -> None:
        self.device = usable_device(device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        if dtype not in TORCH_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected auto or one of {', '.join(TORCH_DTYPES)}")
        self.dtype = TORCH_DTYPES[dtype]
        self.cache_dtype = "bfloat16" if dtype == "bfloat16" else "float16"  # what keys and values are computed in
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else None
        self._frequencies: dict[int, tuple[RopeParams, Tensor]] = {}  # on the device
        self._angles: list[tuple[Tensor, RopeParams, Tensor, Tensor]] | None = None  # of the step that is computed
        self._repeats = True  # whether a step's kernels depend on its shape alone

    def limit_threads(self, threads: int) -> None:
        """PyTorch has at most this many threads from now on, for what the calling thread computes."""
        torch.set_num_threads(threads)

    def matrix(self, tensor: StoredTensor, rows: Rows | None = None) -> Tensor:
        if rows is not None:
            tensor = tensor.take_rows(rows)
        if tensor.type in _STORED and _STORED[tensor.type] == self.dtype:
            stored = torch.from_numpy(np.array(tensor.data)).view(self.dtype)
        else:
            stored = torch.from_numpy(tensor.dequantize().reshape(-1)).to(self.dtype)
        return stored.reshape(tensor.rows, tensor.columns).to(self.device)

    def vector(self, tensor: StoredTensor) -> Tensor:
        return torch.from_numpy(tensor.dequantize().reshape(-1)).to(self.device)

    def weight_memory(self, tensors: Iterable[StoredTensor]) -> None:
        """Unknown: the device's own allocator reports when it is full."""

    def finish(self) -> None:
        """Parameters are ready as soon as they are created."""

    def cache(self, layout: KVLayout, pages: int | Sequence[int]) -> TorchCache:
        return TorchCache(layout, pages, self.device)

    def bank(self, source: BankSource, params: MemoryParams) -> tuple[Tensor, Tensor]:
        """Keys and values (kv_heads, rows, head_dim), in the type of the activations."""
        shape = (params.rows, params.kv_heads, params.head_dim)
        sides = (
            torch.from_numpy(np.ascontiguousarray(side)).reshape(shape).transpose(0, 1)
            for side in source.projected(params.rows)
        )
        first, second = (side.contiguous().to(self.device, self.dtype) for side in sides)
        return first, second

    def windows(self, layers: int, width: int, length: int) -> TorchWindows:
        return TorchWindows(layers, width, length, self.device, self.dtype)

    def compile(self, forward: Forward, cache: TorchCache) -> Callable[[Batch], Output]:
        def run(batch: TorchBatch) -> Sequence[Tensor]:
            self._angles = []
            try:
                hidden, logits, *early = forward(self, batch, cache)
            finally:
                self._angles = None
            return hidden, logits, *logits.max(-1), *early

        recorded = self.device.type in RECORDS
        graphs = DecodeGraphs(run, cache.layout, cache.pages, self.device) if recorded else None

        def step(batch: Batch) -> Output:
            with torch.inference_mode():
                outputs: Sequence[Tensor] | None = None
                if graphs is not None and self._repeats:
                    outputs = graphs.step(batch)
                if outputs is None:
                    outputs = run(TorchBatch.of(batch, cache.layout, self.device))
                return _output(outputs, batch.greedy and not batch.early_layers)

        return step

    def embed(self, matrix: Tensor, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, matrix)

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    def linear(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, None if bias is None else bias.to(x.dtype))

    def factors(self, pairs: Sequence[tuple[Floats, Floats] | None], shape: tuple[int, int]) -> list[Any]:
        return [
            None if pair is None else [torch.from_numpy(one).to(self.device, self.dtype) for one in pair]
            for pair in pairs
        ]

    def add_low_rank(self, y: Tensor, x: Tensor, factors: list[Any], batch: TorchBatch) -> Tensor:
        self._repeats = False
        adapters = batch.host.row_adapters(len(x))
        for adapter in {int(one) for one in adapters if one >= 0 and factors[one] is not None}:
            a, b = factors[adapter]
            rows = torch.from_numpy(np.flatnonzero(adapters == adapter)).to(x.device)
            y = y.index_add(0, rows, F.linear(F.linear(x[rows], a), b))
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        groups = x.float().view(*x.shape[:-1], x.shape[-1] // len(weight), len(weight))  # there may be no rows
        return F.rms_norm(groups, weight.shape, weight, epsilon).to(x.dtype).view(x.shape)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        return F.layer_norm(x.float(), weight.shape, weight, bias, epsilon).to(x.dtype)

    def rope(self, x: Tensor, positions: Tensor, params: RopeParams) -> Tensor:
        cos, sin = self._rotation(positions, params)
        heads = x.view(*x.shape[:-1], -1, params.head_dim).float()
        turned, rest = heads[..., : params.rotary_dim], heads[..., params.rotary_dim :]
        first, second = turned.chunk(2, dim=-1)
        rotated = torch.addcmul(turned * cos, torch.cat((second, first), dim=-1), sin)
        whole = torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
        return whole.to(x.dtype).view(x.shape)

    def _rotation(self, positions: Tensor, params: RopeParams) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the first half's negated, (rows, 1, rotary_dim); once for all layers of a step."""
        for known, by, cos, sin in self._angles or ():
            if known is positions and by is params:
                return cos, sin
        _, frequencies = self._frequencies.get(id(params), (None, None))
        held = self._frequencies.get(id(params))
        frequencies = torch.from_numpy(params.frequencies).to(positions.device) if held is None else held[1]
        angles = positions.to(torch.float32)[:, None, None] * frequencies
        cos, sin = angles.cos() * params.magnitude, angles.sin() * params.magnitude
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        if self._angles is not None:
            self._frequencies[id(params)] = params, frequencies
            self._angles.append((positions, params, cos, sin))
        return cos, sin

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, layer: int, batch: TorchBatch, params: AttentionParams
    ) -> Tensor:
        group, index = cache.layout.place(layer)
        keys, values = (side.view(-1, params.kv_heads, params.head_dim) for side in cache.values[group][index])
        new_slots = batch.new_slots(group)
        keys[new_slots] = k.view(len(k), params.kv_heads, params.head_dim).to(keys.dtype)
        values[new_slots] = v.view(len(v), params.kv_heads, params.head_dim).to(values.dtype)
        out = torch.empty_like(q)
        for part in batch.parts(group):
            own = q if part.whole else q[part.rows]
            queries = own.view(*part.rows.shape, params.heads, params.head_dim).transpose(1, 2)
            past_keys, past_values = (side[part.slots].transpose(1, 2).to(q.dtype) for side in (keys, values))
            attended = _attend(queries, past_keys, past_values, part, params).transpose(1, 2).reshape(-1, q.shape[1])
            if part.whole:
                return attended
            out[part.rows.flatten()] = attended
        return out

    def activation(self, x: Tensor, kind: str) -> Tensor:
        if kind == "silu":
            return F.silu(x)
        if kind == "relu":
            return F.relu(x)
        if kind in ("sigmoid", "tanh"):
            return torch.sigmoid(x) if kind == "sigmoid" else torch.tanh(x)
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def gated_activation(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        return self.activation(gate, kind) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def route(self, x: Tensor, router: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        probabilities = F.linear(x, router).float().softmax(-1)
        weights, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        weights, ids = weights[:, :top_k], ids[:, :top_k]
        return ids, weights / weights.sum(-1, keepdim=True) if normalise else weights

    def choose(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights, ids = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        weights, ids = weights[:, :top_k], ids[:, :top_k]
        return ids, weights / weights.sum(-1, keepdim=True)

    def pool_rows(
        self, x: Tensor, batch: TorchBatch, windows: TorchWindows | None, layer: int, params: PoolParams
    ) -> Tensor:
        self._repeats = False
        return pooled_rows(x, batch.host, windows, layer, params)

    def memory_attention(
        self, q: Tensor, bank: tuple[Tensor, Tensor], ids: Tensor | None, weights: Tensor | None, params: MemoryParams
    ) -> Tensor:
        self._repeats = False
        return attend_memory(q, bank, ids, weights, params)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate: Sequence[Tensor],
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        kind: str,
    ) -> Tensor:
        self._repeats = False
        shares = torch.zeros(*ids.shape, down[0].shape[0], dtype=x.dtype, device=x.device)
        for expert in torch.unique(ids).tolist():
            row, place = torch.nonzero(ids == expert, as_tuple=True)
            inner = self.gated_activation(F.linear(x[row], gate[expert]), F.linear(x[row], up[expert]), kind)
            shares[row, place] = F.linear(inner, down[expert])
        return (shares * weights[:, :, None].to(x.dtype)).sum(dim=1)


def _output(outputs: Sequence[Tensor], greedy: bool) -> Output:
    """What a step returns. outputs: hidden, logits, each row's largest logit and the lowest id that has it, early ones.

    greedy: only those ids are wanted. Where the largest logit is no finite number, all are returned, so that whoever
    draws says what is wrong with them.
    """
    hidden, logits, peaks, tokens, *early = outputs
    if greedy:
        last, highest, found = on_host(hidden.float(), peaks.float(), tokens.int())
        if np.isfinite(highest).all():
            return Output(np.empty((len(found), 0), np.float32), last, found)
    last, every, *layers = on_host(hidden.float(), logits.float(), *(one.float() for one in early))
    return Output(every, last, early=np.stack(layers) if layers else None)


def on_host(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Their values; from a GPU copied one after the other, and waited for once."""
    if not tensors[0].is_cuda:
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def _attend(q: Tensor, k: Tensor, v: Tensor, part: Together, params: AttentionParams) -> Tensor:
    """q (S, heads, new, head_dim) of the part's rows; k and v (S, kv_heads, longest, head_dim) of its slots."""
    visible = part.visible(params.window or 0)
    grouped = params.heads != params.kv_heads
    if not params.softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=params.scale, enable_gqa=grouped)
    if grouped:
        k, v = (side.repeat_interleave(params.heads // params.kv_heads, dim=1) for side in (k, v))
    scores = params.softcap * torch.tanh((q @ k.transpose(2, 3)).float() * params.scale / params.softcap)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype) @ v
