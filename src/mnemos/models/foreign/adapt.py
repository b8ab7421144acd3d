"""The door for other people's modules: what one can do is found out, and a model made of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from mnemos.contract import NO_PAGES, ModelSpec
from mnemos.errors import ConfigError, ModelError
from mnemos.models.foreign.call import Caller
from mnemos.models.foreign.causal import causal_calls
from mnemos.models.foreign.encoder_decoder import EncoderDecoderModel, adapt_encoder_decoder
from mnemos.models.foreign.model import ForeignModel
from mnemos.models.foreign.probe import Probe
from mnemos.models.foreign.settings import find_context, special_tokens
from mnemos.models.foreign.signature import describe, device_of
from mnemos.models.foreign.stored_tensors import move_plain
from mnemos.ops.torch import usable_device

if TYPE_CHECKING:
    from mnemos.models.memory_transformer.model import MemoryModel

_FEW = 8  # one added token for so many of the model's is taken for a habit


def adapt(
    module: nn.Module,
    *,
    device: str | None = None,
    use_kv_cache: bool = True,
    context_length: int | None = None,
    vocabulary_size: int | None = None,
) -> ForeignModel | EncoderDecoderModel | MemoryModel:
    """Makes any causal nn.Module that returns logits a `Model`, or a Hugging Face encoder-decoder module.

    forward(input_ids (batch, time) int64), also with attention_mask, position_ids and a cache; see
    mnemos.models.foreign.cache_styles for the styles. The module is tried once on a few tokens. device: where the
    module is moved to, itself and not a copy; "auto" is the best device that there is. context_length: the positions
    of a module that does not say itself how many it has. vocabulary_size: of the tokenizer, which may exceed the
    module's by a few. Errors: ModelError with the module's class and signature.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model is a {type(module).__name__}; expected a torch.nn.Module or a mnemos Model")
    empty = next((name for name, p in module.named_parameters() if p.device.type == "meta"), None)
    if empty is not None:
        raise ModelError(f"{describe(module)} has no values for {empty} (its device is meta); expected loaded weights")
    if device is not None:
        _move(module, device)
    own = _memory_model(module, use_kv_cache, context_length)
    if own is not None:
        return own
    caller = Caller(module)
    inner = caller.inner
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return adapt_encoder_decoder(caller, context_length)
    abilities = Probe(caller).run(use_kv_cache, find_context(inner, None, context_length))
    caller.settle()
    if vocabulary_size is not None:
        _check_vocabulary(module, vocabulary_size, abilities.vocabulary)
    if use_kv_cache and abilities.cache is None:
        warnings.warn(
            f"{type(module).__name__} has no cache that can be used: every token runs over the whole text again, which "
            "is slow. Give forward a past_kv argument and return (logits, past_kv), or use CachedAttention.",
            stacklevel=3,
        )
    cache = abilities.cache
    spec = ModelSpec(
        architecture=type(module).__name__,
        vocabulary_size=abilities.vocabulary,
        context_length=find_context(inner, abilities.table_positions, context_length),
        hidden_size=abilities.hidden_size,
        layout=NO_PAGES,
        states=True,
        chunks=cache is not None and cache.chunks,  # without a cache, too, a prompt is better run once
        batches=abilities.batches if cache is None else cache.batches,
        rewinds=cache is None or cache.rewinds,
        **special_tokens(inner, abilities.vocabulary),
        parameters=_count(module),
    )
    return ForeignModel(caller, causal_calls(caller, abilities), spec)


def _count(module: nn.Module) -> int:
    """Parameters, and the weights that quantized layers keep in other forms."""
    quantized = sum(getattr(member, "stored_values", 0) for member in module.modules())
    return quantized + sum(p.numel() for p in module.parameters())


def _is_memory_model(module: nn.Module) -> bool:
    """Whether a module may be one of Mnemos's own; says so without importing them."""
    return type(module).__module__.startswith("mnemos.models.memory_transformer.")


def _memory_model(module: nn.Module, use_kv_cache: bool, context_length: int | None) -> MemoryModel | None:
    """The model of a module of Mnemos's own; probing would be misled by a router that sees a whole prompt."""
    inner = module
    if type(module).__module__.startswith("mnemos.compress.modules."):  # quantized, pruned or distilled
        inner = next((part for part in module.children() if _is_memory_model(part)), module)
    if not _is_memory_model(inner):
        return None
    from mnemos.models.memory_transformer.model import MemoryModel, MemoryModule

    if not isinstance(inner, MemoryModule):
        return None
    if not use_kv_cache:
        name = type(module).__name__
        raise ConfigError(f"use_kv_cache is False for a {name}, which routes by what it keeps; leave it out")
    return MemoryModel(inner, context_length, module)


def _check_vocabulary(module: nn.Module, tokens: int, logits: int) -> None:
    """A few tokens that only the tokenizer has, such as one for padding, are harmless; many are a mistake."""
    if tokens <= logits:
        return
    if tokens - logits > logits // _FEW:
        raise ModelError(
            f"the tokenizer has {tokens} tokens but {describe(module)} returns {logits} logits; expected at least as "
            "many logits as tokens"
        )
    warnings.warn(
        f"the tokenizer has {tokens} tokens but {describe(module)} returns {logits} logits: prompts with other tokens "
        "are refused",
        stacklevel=4,
    )


def _move(module: nn.Module, name: str) -> None:
    """Moves a module to a device. ConfigError where it cannot be there."""
    device = usable_device(name)
    now = device_of(module)
    if now == device or (device.index is None and now.type == device.type):
        return
    try:
        module.to(device)
        move_plain(module, device)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # no memory, or weights that are bound to a place
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {name!r} and {type(module).__name__} is on {now}, from where it cannot be moved: "
            f"{reason}; load it there, or leave device out"
        ) from error
