"""Built-in architectures as modules of PyTorch that exporters can trace, from the same files that the engine runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnemos.errors import UnsupportedError
from mnemos.export.traced_ops import Held, Past, TextRows, TracedOps
from mnemos.formats.checkpoint import Checkpoint
from mnemos.models.load import load_model_on


class TorchForm(nn.Module):
    """A built-in architecture over dense attention, float32: token ids (batch, time) in, logits for all of them out.

    Its parameters are named as the checkpoint's tensors, tied ones stored once. heads are the queries'; layers,
    kv_heads and head_dim are its cache's. A memory-augmented model's banks are parameters too, as the keys and values
    that its layers read.
    """

    def __init__(self, checkpoint: Checkpoint, context_length: int | None = None) -> None:
        """Errors: those of `load_model`."""
        super().__init__()
        ops = TracedOps(self)
        loaded = load_model_on(lambda: ops, checkpoint, dtype="float32", context_length=context_length)
        routing = getattr(loaded.architecture, "routing", None)
        self.spec, self._remembers = loaded.spec, routing is not None and routing.remembers
        self._forward, self._ops = loaded.architecture.forward, ops
        layout = loaded.spec.layout
        self.heads = loaded.architecture.config.num_attention_heads
        self.layers, self.kv_heads, self.head_dim = layout.layers, layout.kv_heads, layout.head_dim
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of token ids (batch, time) from position 0."""
        logits, _ = self.continued(input_ids, None, ())
        return logits

    @property
    def remembers(self) -> bool:
        """Whether what comes next depends on more than keys and values."""
        return self._remembers

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
        held = Held(past)
        rows = TextRows(input_ids.reshape(-1), positions.reshape(-1), batch, time, attention_mask)
        _, logits = self._forward(self._ops, rows, held)  # type: ignore[arg-type]
        return logits.view(batch, time, logits.shape[-1]), tuple(held.present)


class WithCache(nn.Module):
    """A `TorchForm` whose keys and values are inputs and outputs: (ids, mask, key 0, value 0, ...) -> (logits, ...)."""

    def __init__(self, form: TorchForm) -> None:
        """UnsupportedError: a memory-augmented model whose router goes by the latest positions, a further cache."""
        if form.remembers:
            raise UnsupportedError(
                f"{form.spec.architecture} chooses chapters by a window of positions (rolling or hybrid routing), "
                "which a cache of keys and values does not hold; export it without a cache, or with sequence routing"
            )
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
        ids = torch.randint(0, self.form.spec.vocabulary_size, (batch, before), generator=generator, device="cpu")
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
