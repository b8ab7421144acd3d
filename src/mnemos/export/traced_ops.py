"""The operators of the engine as a trace can hold them: over parameters of a module, and without a branch on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.formats.tensor import Tensor as StoredTensor
from mnemos.ops.protocol import AttentionParams, BankSource, MemoryParams, PoolParams, Rows
from mnemos.ops.torch import TorchOps

Past = tuple[tuple[Tensor, Tensor], ...]  # keys and values (batch, kv_heads, past, head_dim) of each layer


@dataclass
class Held:
    """The keys and values of the layers before a call, and with its own."""

    past: Past
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class TextRows:
    """What an architecture reads of a batch: here rows of a rectangle, (batch * time,)."""

    token_ids: Tensor
    positions: Tensor
    batch: int
    time: int
    mask: Tensor | None
    logit_rows: None = None  # all of them


@dataclass(frozen=True)
class _Key:
    """A parameter by name, so that tracers meet it as a parameter of the module and not as a constant."""

    name: str


class TracedOps(TorchOps):
    """PyTorch's operators on parameters of a module, with attention over a rectangle in place of pages."""

    name = "torch"
    cache_dtype = "float32"

    def __init__(self, module: nn.Module) -> None:
        super().__init__("cpu", "float32")
        self._module = module
        self._counts: dict[str, int] = {}

    def _keep(self, name: str, value: Tensor) -> _Key:
        name = name.replace(".", "_") or "parameter"
        count = self._counts[name] = self._counts.get(name, 0) + 1
        label = name if count == 1 else f"{name}_part_{count}"
        self._module.register_parameter(label, nn.Parameter(value, requires_grad=False))
        return _Key(label)

    def _value(self, key: Any) -> Tensor:
        value: Tensor = getattr(self._module, key.name)
        return value

    def matrix(self, tensor: StoredTensor, rows: Rows | None = None) -> Any:
        return self._keep(tensor.name, super().matrix(tensor, rows))

    def vector(self, tensor: StoredTensor) -> Any:
        return self._keep(tensor.name, super().vector(tensor))

    def compile(self, forward: Any, cache: Any) -> Any:
        raise AssertionError("a traced architecture is not stepped")

    def embed(self, matrix: Any, token_ids: Tensor) -> Tensor:
        return super().embed(self._value(matrix), token_ids)

    def linear(self, x: Tensor, matrix: Any, bias: Any = None) -> Tensor:
        return super().linear(x, self._value(matrix), None if bias is None else self._value(bias))

    def rms_norm(self, x: Tensor, weight: Any, epsilon: float) -> Tensor:
        return super().rms_norm(x, self._value(weight), epsilon)

    def layer_norm(self, x: Tensor, weight: Any, bias: Any, epsilon: float) -> Tensor:
        return super().layer_norm(x, self._value(weight), None if bias is None else self._value(bias), epsilon)

    def route(self, x: Tensor, router: Any, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """With topk, which other runtimes have, in place of a stable sort: equal probabilities may change places."""
        weights, ids = self.linear(x, router).softmax(-1).topk(top_k)
        return ids, weights / weights.sum(-1, keepdim=True) if normalise else weights

    def choose(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(top_k)
        return ids, weights / weights.sum(-1, keepdim=True)

    def bank(self, source: BankSource, params: MemoryParams) -> Any:
        keys, values = super().bank(source, params)
        return self._keep("memory_keys", keys), self._keep("memory_values", values)

    def memory_attention(self, q: Tensor, bank: Any, ids: Any, weights: Any, params: MemoryParams) -> Tensor:
        """Attention to all of a bank, in which what is not chosen counts for nothing."""
        queries = q.view(q.shape[0], params.heads, params.head_dim)
        group = params.heads // params.kv_heads
        keys, values = (self._value(side).repeat_interleave(group, dim=0) for side in bank)  # (heads, N, head_dim)
        scores = torch.einsum("rhd,hnd->rhn", queries, keys) * params.scale
        if ids is None:
            return torch.einsum("rhn,hnd->rhd", scores.softmax(-1), values).reshape(q.shape)
        scores = scores.view(q.shape[0], params.heads, params.chapters, -1)
        chapter = torch.arange(params.chapters - params.shared, device=q.device)
        picked = ids[:, :, None] == chapter  # (rows, chosen, chapters that are chosen from)
        share = params.scaling * (picked * weights[:, :, None]).sum(1)
        first = torch.ones((q.shape[0], params.shared), dtype=q.dtype, device=q.device)
        if params.separate:
            shares = (scores[:, :, params.shared :].softmax(-1) * share[:, None, :, None]).flatten(2)
            if params.shared:
                joint = scores[:, :, : params.shared].flatten(2).softmax(-1)
                shares = torch.cat((joint, shares), dim=-1)
            return torch.einsum("rhn,hnd->rhd", shares, values).reshape(q.shape)
        read = torch.cat((first > 0, picked.any(1)), dim=1)[:, None, :, None]
        share = torch.cat((first, share), dim=1)
        if params.shared:
            share = share / share.sum(1, keepdim=True)
        share = share[:, None, :, None]
        scores = (scores * share).masked_fill(~read, torch.finfo(scores.dtype).min)
        mixed = scores.flatten(2).softmax(-1).view(scores.shape) * share
        return torch.einsum("rhn,hnd->rhd", mixed.flatten(2), values).reshape(q.shape)

    def pool_rows(self, x: Tensor, batch: Any, windows: Any, layer: int, params: PoolParams) -> Tensor:
        """Of a text that begins in this call, what all of it is routed by; of another, each row itself."""
        rows = batch
        states = x.view(rows.batch, rows.time, -1)
        positions = rows.positions.view(rows.batch, rows.time)
        real = torch.ones_like(positions) if rows.mask is None else rows.mask[:, -rows.time :]
        share = real.to(x.dtype)
        if params.kind == "rolling":
            share = share * (positions > positions[:, -1:] - params.window)
        if params.kind == "sequence-rolling":
            distance = positions[:, :, None] - positions[:, None, :]
            within = share[:, None] * ((distance >= 0) & (distance < params.window))
            within = within / within.sum(-1, keepdim=True).clamp(min=1)
            share = (within * share[:, :, None]).sum(1)
        pooled = (states * share[:, :, None]).sum(1, keepdim=True) / share.sum(1).clamp(min=1)[:, None, None]
        begins = (positions[:, :1] == 0)[:, :, None]
        return torch.where(begins, pooled, states).reshape(x.shape)

    def experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate: Sequence[Any], up: Sequence[Any], down: Sequence[Any],
        kind: str,
    ) -> Tensor:  # fmt: skip
        """All experts for all rows, as a trace cannot depend on which ones were chosen."""
        out = torch.zeros_like(x)
        for expert in range(len(gate)):
            share = torch.where(ids == expert, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
            inner = self.gated_activation(self.linear(x, gate[expert]), self.linear(x, up[expert]), kind)
            out = out + share * self.linear(inner, down[expert])
        return out

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, batch: Any, params: AttentionParams
    ) -> Tensor:
        rows, held = batch, cache

        def heads(x: Tensor, count: int) -> Tensor:
            return x.view(rows.batch, rows.time, count, params.head_dim).transpose(1, 2)

        queries, keys, values = heads(q, params.heads), heads(k, params.kv_heads), heads(v, params.kv_heads)
        if held.past:
            before = held.past[layer]
            keys, values = torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)
        held.present.append((keys, values))
        total = keys.shape[2]
        at = torch.arange(total, device=q.device)
        distance = at[total - rows.time :, None] - at[None, :]
        visible = distance >= 0
        if params.window:
            visible = visible & (distance < params.window)
        visible = visible[None, None]
        if rows.mask is not None:
            visible = visible & (rows.mask[:, None, None, :] > 0)
        group = params.heads // params.kv_heads
        if group > 1:
            keys, values = (side.repeat_interleave(group, dim=1) for side in (keys, values))
        scores = (queries @ keys.transpose(2, 3)) * params.scale
        if params.softcap:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        # Not -inf: a row of padding sees nothing, and is to be a number all the same.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1) @ values
        return mixed.transpose(1, 2).reshape(rows.batch * rows.time, params.heads * params.head_dim)
