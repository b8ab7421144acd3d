"""Hugging Face encoder-decoder models (T5, BART and their kin) as models: the prompt is read once, by the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnemos.contract import KVLayout, ModelSpec
from mnemos.errors import ConfigError, ModelError
from mnemos.models.foreign.cache_styles import Axes, HuggingFaceStyle, Source, gather
from mnemos.models.foreign.call import Caller, describe
from mnemos.models.foreign.growing_cache import Lane
from mnemos.models.foreign.model import ForeignModel, Group, Job
from mnemos.models.foreign.probe import Abilities
from mnemos.models.foreign.settings import find_context, setting, special_tokens

_AXES = Axes(batch=0, time=2)


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the encoder made of a prompt, (1, source time, hidden size)."""

    states: Tensor


class EncoderDecoderModel(ForeignModel):
    """The decoder, with each sequence's encoder output and the keys and values over it kept in its slot."""

    start_tokens: list[int]

    def begin(self, prompt: Sequence[int]) -> tuple[object, list[int]]:
        """Runs the encoder over the prompt; the decoder begins with the model's start tokens."""
        ids = torch.tensor([list(prompt)], device=self._caller.device)
        self._caller.check_weights()
        with self._caller.running(ids):
            encoder: Any = self.module.get_encoder
            states = encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return Encoded(states), list(self.start_tokens)

    def _partition(self, jobs: list[Job]) -> list[list[Job]]:
        parts: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            parts.setdefault((job.start, len(job.new)), []).append(job)
        return list(parts.values())

    def _snapshot(self, group: Group) -> Source:
        past = group.past
        own, cross = (HuggingFaceStyle().leaves(c) for c in (past.self_attention_cache, past.cross_attention_cache))
        mask = group.kept  # over the encoder's positions; the decoder's own have no gaps
        return Source(own, [_AXES] * len(own), None, Source(cross, [_AXES] * len(cross), mask))

    def _continue(self, jobs: list[Job], wanted: npt.NDArray[np.bool_]) -> list[tuple[Job, Any, Any]]:
        for job in jobs:
            if not isinstance(job.slot.condition, Encoded):
                raise ModelError(f"{describe(self.module)} needs an encoded prompt; expected begin() before it")
        past, mask, _ = self._assemble(jobs)
        encoded = [job.slot.condition.states for job in jobs]
        states, mask = _side_by_side(encoded) if mask is None else (encoded[0], mask)
        ids, _ = self._pad([job.new for job in jobs])
        with self._caller.running(ids):
            output = self.module(
                # The states themselves are read only where the keys and values over them are not known yet.
                encoder_outputs=(states.expand(len(jobs), -1, -1),),
                attention_mask=mask.to(torch.int64),
                decoder_input_ids=ids,
                past_key_values=past,
                use_cache=True,
            )
        group = Group(output.past_key_values, [job.slot for job in jobs], mask)
        for job in jobs:
            job.slot.tokens += job.new
            job.slot.group, job.slot.source = group, None
        return self._split(jobs, output.logits, [len(job.new) for job in jobs])

    def _assemble(self, jobs: list[Job]) -> tuple[Any, Tensor | None, list[Lane]]:
        from transformers import DynamicCache, EncoderDecoderCache

        if jobs[0].start == 0:
            return EncoderDecoderCache(DynamicCache(), DynamicCache()), None, []
        group = jobs[0].slot.group
        if group is not None and group.is_exactly(jobs):
            return group.past, group.kept, []
        own, cross = [], []
        for job in jobs:
            self.freeze(job.slot)
            source = job.slot.source
            assert source is not None and source.cross is not None
            own.append((source, job.slot.row, job.start))
            cross.append((source.cross, job.slot.row, job.slot.condition.states.shape[1]))
        style = HuggingFaceStyle()
        own_leaves, _ = gather(own)
        cross_leaves, mask = gather(cross)
        if mask is None:
            mask = torch.ones(len(jobs), cross[0][2], dtype=torch.bool, device=self._caller.device)
        built = (style.build(leaves, 0) for leaves in (own_leaves, cross_leaves))
        return EncoderDecoderCache(*built), mask, []


def _side_by_side(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Encoder outputs padded to the longest, (batch, source time, hidden size), and which positions are real."""
    joined = nn.utils.rnn.pad_sequence([one[0] for one in states], batch_first=True)
    lengths = torch.tensor([one.shape[1] for one in states], device=joined.device)
    return joined, torch.arange(joined.shape[1], device=joined.device) < lengths[:, None]


def adapt_encoder_decoder(module: nn.Module, caller: Caller, context_length: int | None) -> EncoderDecoderModel:
    """Makes a model of a Hugging Face encoder-decoder module. ConfigError: it does not say how the decoder begins."""
    start = setting(module, "decoder_start_token_id")
    if start is None:
        raise ConfigError(f"{type(module).__name__}'s decoder_start_token_id is None; set it in its config")
    context = find_context(module, None, context_length)
    ids = torch.tensor([[start]], device=caller.device)
    with caller.running(ids):
        output = module(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    caller.settle()
    spec = ModelSpec(
        architecture=type(module).__name__,
        vocabulary_size=output.logits.shape[-1],
        context_length=context,
        hidden_size=0,
        layout=KVLayout(1, 1, 1, page_size=context, dtype="float32"),
        **special_tokens(module, output.logits.shape[-1]),
        parameters=sum(p.numel() for p in module.parameters()),
    )
    abilities = Abilities(
        output.logits.shape[-1], 0, False, HuggingFaceStyle(), [], chunks=True, gaps=False, grows=False
    )
    model = EncoderDecoderModel(module, abilities, caller, spec)
    model.start_tokens = [int(start)]
    return model
