"""Hugging Face encoder-decoder models (T5, BART and their kin) as models: the prompt is read once, by the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.contract import NO_PAGES, Batch, ModelSpec, Output
from mnemos.errors import ConfigError, ModelError
from mnemos.models.foreign.cache_styles import Axes, HuggingFaceStyle, Snapshot, side_by_side
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.jobs import Bools, Job, JobOutput, pad, split
from mnemos.models.foreign.model import ForeignModel
from mnemos.models.foreign.settings import find_context, setting, special_tokens
from mnemos.models.foreign.signature import describe
from mnemos.models.foreign.slots import Group

_AXES = Axes(batch=0, time=2)


class EncoderDecoderCalls:
    """Calls the decoder, with each sequence's encoder output and the keys and values over it from its slot."""

    def __init__(self, caller: Caller, vocabulary: int) -> None:
        self.caller = caller
        self.vocabulary = vocabulary

    def encode(self, prompt: Sequence[int]) -> Tensor:
        """What the encoder makes of the prompt, (1, source time, hidden size)."""
        ids = torch.tensor([list(prompt)], device=self.caller.device)
        self.caller.check_weights()
        with self.caller.running(ids):
            encoder: Any = self.caller.inner.get_encoder
            states: Tensor = encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return states

    def partition(self, jobs: list[Job]) -> list[list[Job]]:
        """The decoder's own keys have no gaps: sequences of equal shape share a call, whatever their sources'."""
        parts: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            parts.setdefault((job.start, len(job.new)), []).append(job)
        return list(parts.values())

    def run(self, jobs: list[Job], wanted: Bools) -> list[JobOutput]:
        """One call. ModelError: a sequence has no encoded prompt."""
        encoded = [self._encoded(job) for job in jobs]
        past, mask = self._assemble(jobs)
        states, mask = _pad_states(encoded) if mask is None else (encoded[0], mask)
        ids, _ = pad([job.new for job in jobs], self.caller.device)
        with self.caller.running(ids):
            output = self.caller.inner(
                # The states themselves are read only where the keys and values over them are not known yet.
                encoder_outputs=(states.expand(len(jobs), -1, -1),),
                attention_mask=mask.to(torch.int64),
                decoder_input_ids=ids,
                past_key_values=past,
                use_cache=True,
            )
        length = jobs[0].start + len(jobs[0].new)
        group = Group(output.past_key_values, [job.slot for job in jobs], self._snapshot, length, mask)
        for job in jobs:
            job.slot.tokens += job.new
            job.slot.group, job.slot.snapshot = group, None
        return split(jobs, output.logits, [len(job.new) for job in jobs], self.caller, self.vocabulary)

    def _encoded(self, job: Job) -> Tensor:
        if job.slot.encoded is None:
            raise ModelError(f"{describe(self.caller.module)} needs an encoded prompt; expected begin() before it")
        return job.slot.encoded

    def _snapshot(self, group: Group) -> Snapshot:
        past = group.past
        own, cross = (HuggingFaceStyle().leaves(c) for c in (past.self_attention_cache, past.cross_attention_cache))
        assert group.real is not None  # of the encoder's positions; the decoder's own have no gaps
        encoded = Snapshot(cross, [_AXES] * len(cross), group.real.shape[1], group.real)
        return Snapshot(own, [_AXES] * len(own), group.length, None, encoded)

    def _assemble(self, jobs: list[Job]) -> tuple[Any, Tensor | None]:
        """The cache of these sequences' earlier tokens, and which of the encoder's positions are real."""
        from transformers import DynamicCache, EncoderDecoderCache

        if jobs[0].start == 0:
            return EncoderDecoderCache(DynamicCache(), DynamicCache()), None
        group = jobs[0].slot.group
        if group is not None and group.is_exactly([job.slot for job in jobs]):
            return group.past, group.real
        own, cross = [], []
        for job in jobs:
            job.slot.freeze()
            snapshot = job.slot.snapshot
            assert snapshot is not None and snapshot.cross is not None
            own.append((snapshot, job.slot.row, job.start))
            cross.append((snapshot.cross, job.slot.row, self._encoded(job).shape[1]))
        style = HuggingFaceStyle()
        own_leaves, _ = side_by_side(own)
        cross_leaves, mask = side_by_side(cross)
        if mask is None:
            mask = torch.ones(len(jobs), cross[0][2], dtype=torch.bool, device=self.caller.device)
        built = (style.build(leaves, 0) for leaves in (own_leaves, cross_leaves))
        return EncoderDecoderCache(*built), mask


def _pad_states(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Encoder outputs padded to the longest, (batch, source time, hidden size), and which positions are real."""
    joined = nn.utils.rnn.pad_sequence([one[0] for one in states], batch_first=True)
    lengths = torch.tensor([one.shape[1] for one in states], device=joined.device)
    return joined, torch.arange(joined.shape[1], device=joined.device) < lengths[:, None]


class EncoderDecoderModel:
    """A module that reads the prompt with an encoder, and the decoder run as any foreign model."""

    def __init__(self, caller: Caller, spec: ModelSpec, start_token: int) -> None:
        self.module = caller.inner
        self.spec = spec
        self._calls = EncoderDecoderCalls(caller, spec.vocabulary_size)
        self._decoder = ForeignModel(caller, self._calls, spec)
        self._start_token = start_token

    def reserve_states(self, slots: int) -> None:
        """See `StatefulModel`, as for the next two."""
        self._decoder.reserve_states(slots)

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Forks sequences, which go on to share what the encoder made of their prompt."""
        self._decoder.copy_states(sources, targets)

    def clear_states(self, slots: Sequence[int]) -> None:
        """Forgets sequences and their encoded prompts."""
        self._decoder.clear_states(slots)

    def start_tokens(self, prompt: Sequence[int]) -> list[int]:
        """The decoder begins with the model's start token, whatever the prompt."""
        return [self._start_token]

    def begin(self, state: int, prompt: Sequence[int]) -> None:
        """Runs the encoder over the prompt, for the sequence of this slot. ModelError: whatever the module raises."""
        self._decoder.slots[state].encoded = self._calls.encode(prompt)

    def forward(self, batch: Batch) -> Output:
        """Runs the decoder over the batch."""
        return self._decoder.forward(batch)


def adapt_encoder_decoder(caller: Caller, context_length: int | None) -> EncoderDecoderModel:
    """Makes a model of a Hugging Face encoder-decoder module. ConfigError: it does not say how the decoder begins."""
    module = caller.inner
    start = setting(module, "decoder_start_token_id")
    if start is None:
        raise ConfigError(f"{type(module).__name__}'s decoder_start_token_id is None; set it in its config")
    ids = torch.tensor([[start]], device=caller.device)
    with caller.running(ids):
        output = module(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    caller.settle()
    vocabulary = output.logits.shape[-1]
    spec = ModelSpec(
        architecture=type(module).__name__,
        vocabulary_size=vocabulary,
        context_length=find_context(module, None, context_length),
        hidden_size=0,
        layout=NO_PAGES,
        states=True,
        shares_prefixes=False,  # what the decoder makes of a text depends on its source
        **special_tokens(module, vocabulary),
        parameters=sum(p.numel() for p in module.parameters()),
    )
    return EncoderDecoderModel(caller, spec, int(start))
