"""Built-in architectures as modules of PyTorch that exporters can trace, from the same files that the engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.errors import UnsupportedError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.tensor import Tensor as StoredTensor
from mnemos.models.load import load_model_on
from mnemos.ops.protocol import AttentionParams, Rows
from mnemos.ops.torch import TorchOps

Past = tuple[tuple[Tensor, Tensor], ...]  # keys and values (batch, kv_heads, past, head_dim) of each layer


class TorchForm(nn.Module):
    """A built-in architecture over dense attention, float32: token ids (batch, time) in, logits for all of them out.

    Its parameters are named as the checkpoint's tensors, tied ones stored once. heads are the queries'; layers,
    kv_heads and head_dim are its cache's.
    """

    def __init__(self, checkpoint: Checkpoint, context_length: int | None = None) -> None:
        """Errors: those of `load_model`; UnsupportedError for memory-augmented models, whose routers keep states."""
        super().__init__()
        ops = _TracedOps(self)
        loaded = load_model_on(lambda: ops, checkpoint, dtype="float32", context_length=context_length)
        if getattr(loaded.architecture, "routing", None) is not None or loaded.spec.architecture.startswith("memory"):
            raise UnsupportedError(
                f"{loaded.spec.architecture} keeps memory banks, which no other runtime's format holds"
            )
        self.spec = loaded.spec
        self._forward, self._ops = loaded.architecture.forward, ops
        layout = loaded.spec.layout
        self.heads = loaded.architecture.config.num_attention_heads
        self.layers, self.kv_heads, self.head_dim = layout.layers, layout.kv_heads, layout.head_dim
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of token ids (batch, time) from position 0."""
        logits, _ = self.continued(input_ids, None, ())
        return logits

    def continued(self, input_ids: Tensor, attention_mask: Tensor | None, past: Past) -> tuple[Tensor, Past]:
        """Logits of the new tokens, and the cache with them.

        attention_mask (batch, past + time): 1 where there is text, 0 for padding on the left; None: all is text.
        """
        batch, time = input_ids.shape
        before = past[0][0].shape[2] if past else 0
        if attention_mask is None:
            positions = (torch.arange(time, device=input_ids.device) + before).expand(batch, time)
        else:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        held = _Held(past)
        rows = _Rows(input_ids.reshape(-1), positions.reshape(-1), batch, time, attention_mask)
        _, logits = self._forward(self._ops, rows, held)  # type: ignore[arg-type]
        return logits.view(batch, time, logits.shape[-1]), tuple(held.present)


class WithCache(nn.Module):
    """A `TorchForm` whose keys and values are inputs and outputs: (ids, mask, key 0, value 0, ...) -> (logits, ...)."""

    def __init__(self, form: TorchForm) -> None:
        super().__init__()
        self.form = form
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        pairs = tuple((past[i], past[i + 1]) for i in range(0, len(past), 2))
        logits, present = self.form.continued(input_ids, attention_mask, pairs)
        return logits, *(side for pair in present for side in pair)

    def plausible(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with keys and values of a text before, which random numbers are nothing like."""
        batch, time = tensors["input_ids"].shape
        before = tensors["attention_mask"].shape[1] - time
        if not before:
            return tensors
        generator = torch.Generator().manual_seed(before)
        ids = torch.randint(0, self.form.spec.vocabulary_size, (batch, before), generator=generator)
        with torch.no_grad():
            _, past = self.form.continued(ids, None, ())
        names = [name for name in tensors if name not in ("input_ids", "attention_mask")]
        return {**tensors, **dict(zip(names, (side for pair in past for side in pair), strict=True))}


def cache_example(form: TorchForm) -> tuple[dict[str, Tensor], None, list[str], dict[str, dict[int, str]]]:
    """What `ONNXExporter.export` takes for a `WithCache`: inputs, no other names, outputs, axes.

    The names are those that optimum and onnxruntime-genai expect: past_key_values.0.key, present.0.key, ...
    """
    names = [f"{layer}.{side}" for layer in range(form.layers) for side in ("key", "value")]
    past = {f"past_key_values.{name}": torch.zeros((1, form.kv_heads, 3, form.head_dim)) for name in names}
    ids, mask = torch.ones((1, 2), dtype=torch.int64), torch.ones((1, 5), dtype=torch.int64)
    axes: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "sequence"}}
    axes["attention_mask"] = {0: "batch", 1: "past + sequence"}
    axes |= {name: {0: "batch", 2: "past"} for name in past}
    outputs = ["logits", *(f"present.{name}" for name in names)]
    return {"input_ids": ids, "attention_mask": mask, **past}, None, outputs, axes


@dataclass
class _Held:
    """The keys and values of the layers before a call, and with its own."""

    past: Past
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Rows:
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


class _TracedOps(TorchOps):
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
        return super().route(x, self._value(router), top_k, normalise)

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
