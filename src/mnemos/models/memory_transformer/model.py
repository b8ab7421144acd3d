"""`MemoryTransformer` and `MemoryAdapter` modules as a `Model`: each text has its own cache and windows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.contract import NO_PAGES, Batch, Floats, ModelSpec, Output
from mnemos.errors import ConfigError, ModelError
from mnemos.models.foreign.settings import special_tokens
from mnemos.models.memory_transformer.adapter import MemoryAdapter
from mnemos.models.memory_transformer.routing import SPARE_POSITIONS
from mnemos.models.memory_transformer.transformer import MemoryCache, MemoryTransformer

MemoryModule = MemoryTransformer | MemoryAdapter


@dataclass
class Text:
    """What is kept of a sequence: how many tokens, and the module's cache of them with its windows."""

    length: int = 0
    past: Any = None

    def fork(self) -> Text:
        """A text that goes on from here separately."""
        # A MemoryCache is never changed; transformers' caches grow in place.
        past = self.past if self.past is None or isinstance(self.past, MemoryCache) else deepcopy(self.past)
        return Text(self.length, past)

    def rewind(self, length: int) -> None:
        """Forgets the tokens after the first `length`."""
        back = self.length - length
        if back <= 0:
            return
        if length == 0:
            self.length, self.past = 0, None
            return
        if isinstance(self.past, MemoryCache):
            layers = [(keys[:, :length], values[:, :length]) for keys, values in self.past]
            self.past = MemoryCache(layers, {i: window[:, :-back] for i, window in self.past.windows.items()})
        else:
            windows = {i: window[:, :-back] for i, window in self.past.memory_windows.items()}
            self.past.crop(length)
            self.past.memory_windows = windows
        self.length = length


class MemoryModel:
    """The module, one text a call, with its weights as they are at each step.

    outer: what is called in its place, a module around it.
    """

    def __init__(self, module: MemoryModule, context_length: int | None, outer: nn.Module | None = None) -> None:
        self.module = module
        self._outer = module if outer is None else outer
        settings = module.config.memory
        self._strategy = settings.routing_strategy_inference
        chosen = bool(module.bank_of_layer) and settings.use_chapters and settings.routed > 0
        pooled = chosen and self._strategy != "token"
        self._pooled = pooled
        inner: Any = module.base_model if isinstance(module, MemoryAdapter) else module
        parameters = sum(p.numel() for p in module.parameters())
        parameters += sum(getattr(part, "stored_values", 0) for part in module.modules())
        self.spec = ModelSpec(
            architecture=type(module).__name__,
            layout=NO_PAGES,
            states=True,
            chunks=not pooled,
            pools_prompts=pooled,
            rewind_limit=SPARE_POSITIONS if pooled and self._strategy in ("rolling", "hybrid") else 0,
            parameters=parameters,
            **_shape(module, inner, context_length),
        )
        self._texts: list[Text] = []

    def reserve_states(self, slots: int) -> None:
        """See `StatefulModel`, as for the next two."""
        self._texts = [Text() for _ in range(slots)]

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Forks texts."""
        for source, target in zip(sources, targets, strict=True):
            self._texts[target] = self._texts[source].fork()

    def clear_states(self, slots: Sequence[int]) -> None:
        """Forgets texts."""
        for slot in slots:
            self._texts[slot] = Text()

    def forward(self, batch: Batch) -> Output:
        """A call for each text. ModelError: whatever the module raises, or its routing strategy is another by now."""
        if not self._texts:
            raise ConfigError("the model has no state slots yet; call reserve_states(slots) first")
        strategy = self.module.config.memory.routing_strategy_inference
        if strategy != self._strategy:
            raise ModelError(
                f"routing_strategy_inference is {strategy!r} and was {self._strategy!r} when the engine was made; make "
                "a new engine for another"
            )
        self._outer.eval()
        logits: list[Floats] = []
        hidden: list[Floats] = []
        for slot, (first, last) in zip(batch.states.tolist(), pairwise(batch.sequence_starts.tolist()), strict=True):
            wanted = batch.logit_rows[(batch.logit_rows >= first) & (batch.logit_rows < last)] - first
            text = self._texts[slot]
            text.rewind(int(batch.positions[first]))
            rows = self._run(text, batch.token_ids[first:last])
            for found, parts in ((rows[0], logits), (rows[1], hidden)):
                parts.append(found[0, torch.from_numpy(wanted).long()].float().cpu().numpy())
        return Output(np.concatenate(logits), np.concatenate(hidden))

    @torch.inference_mode()
    def _run(self, text: Text, token_ids: Any) -> tuple[Tensor, Tensor]:
        """(logits, hidden) (1, T, ...) of a text's next tokens; one by one where a call would route them together."""
        device = next(self.module.parameters()).device
        ids = torch.from_numpy(np.asarray(token_ids)).long().to(device)[None]
        calls = torch.split(ids, 1, dim=1) if self._pooled and text.length else (ids,)
        outputs = []
        for part in calls:
            positions = torch.arange(text.length, text.length + part.shape[1], device=device)[None]
            try:
                out = self._outer(part, position_ids=positions, past_key_values=text.past, use_cache=True)
            except Exception as error:
                raise ModelError(f"{type(self.module).__name__} failed: {type(error).__name__}: {error}") from error
            text.past = out.past_key_values
            text.length += part.shape[1]
            outputs.append(out)
        logits, hidden = (torch.cat([getattr(out, name) for out in outputs], dim=1) for name in ("logits", "hidden"))
        return logits, hidden


def _shape(module: MemoryModule, inner: Any, context_length: int | None) -> dict[str, Any]:
    """The fields of ModelSpec that say how large the model is and how its texts end."""
    if isinstance(module, MemoryAdapter):
        config = inner.config
        vocabulary, longest = config.vocab_size, config.max_position_embeddings
        ends = special_tokens(inner, vocabulary)
        hidden = config.hidden_size
    else:
        model = module.config.model
        vocabulary, longest, hidden = model.vocab_size, model.max_seq_len, model.hidden_dim
        end = model.eos_token_id
        ends = {
            "eos_token_ids": () if end is None else (end,),
            "bos_token_id": model.bos_token_id,
            "pad_token_id": model.pad_token_id,
        }
    length = longest if context_length is None else context_length
    if length > longest:
        raise ConfigError(f"context_length is {length}; the model's is {longest}")
    return {"vocabulary_size": vocabulary, "context_length": length, "hidden_size": hidden, **ends}
