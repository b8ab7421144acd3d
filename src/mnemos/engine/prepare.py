"""Prepares a user's model, and what a user left open, for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mnemos.contract import ConditionedModel, Model, ModelSpec
from mnemos.errors import CapacityError, ConfigError, UnsupportedError
from mnemos.memory.capacity import reserve

if TYPE_CHECKING:
    from mnemos.engine.draft_model import DraftModel
    from mnemos.engine.options import EngineOptions, ModelOptions
    from mnemos.engine.scheduler import Limits
    from mnemos.text.tokenizer import Tokenizer

_STEPS = 0.05  # of a memory limit, for the values that a step computes with


def take_model(model: Any, tokenizer: Tokenizer | None, options: ModelOptions) -> Model:
    """A `Model` unchanged, an nn.Module adapted. ConfigError for options that only apply to a module."""
    if not _is_model(model):
        if options.memory is not None:
            raise UnsupportedError(
                f"memory is {options.memory} for a module in PyTorch; it needs a built-in architecture, as "
                "from_pretrained loads it"
            )
        return _adapt(model, tokenizer, options)
    where = getattr(model, "device", None)
    if options.device not in (None, "auto", where):
        place = "is loaded" if where is None else f"is loaded on {where!r}"
        raise ConfigError(f"device is {options.device!r} and the model {place}; choose its device when loading it")
    if not options.use_kv_cache:
        raise ConfigError("use_kv_cache is False for a model that keeps its own cache; leave it out")
    if options.memory is not None:
        from mnemos.memory.policy import remember

        remember(model, options.memory, options.context_length)
    return model  # type: ignore[no-any-return]


def with_context(spec: ModelSpec, length: int | None) -> ModelSpec:
    """The spec for texts of at most `length` tokens, None for the model's own. ConfigError: the model takes fewer."""
    length = length or spec.context_length
    if length > spec.context_length:
        raise ConfigError(f"context_length is {length}; the model's is {spec.context_length}")
    return replace(spec, context_length=length)


def with_ends(spec: ModelSpec, tokenizer: Tokenizer | None) -> ModelSpec:
    """The spec, with the tokenizer's end-of-text tokens if the model names none."""
    if spec.eos_token_ids:
        return spec
    ends = sorted(token for token in getattr(tokenizer, "eos_ids", ()) if token < spec.vocabulary_size)
    return replace(spec, eos_token_ids=tuple(ends))


def check_limit(gigabytes: float, needed: int, purpose: str) -> int:
    """What is left of a limit on the process's memory after `needed` more bytes; CapacityError if they exceed it."""
    from mnemos.machine.memory import resident_memory

    most, taken = int(gigabytes * 2**30), resident_memory()
    if taken + needed >= most:
        raise CapacityError(
            f"max_memory_gb is {gigabytes:g}: the process takes {taken / 2**30:.2f} GB, and {purpose} "
            f"{needed / 2**30:.2f} GB more; give it more, or load a smaller or quantized model"
        )
    return most - taken - needed


def room_for_pages(gigabytes: float, model: Model, limits: Limits) -> int:
    """Bytes for cache pages within a limit on the process's memory, once the weights are there.

    Kept free: the logits of all sequences, and a part for what steps need besides.
    """
    finish = getattr(model, "finish", None)
    if finish is not None:
        finish()
    logits = 4 * model.spec.vocabulary_size * limits.sequences
    return check_limit(gigabytes, logits + int(_STEPS * gigabytes * 2**30), "a step")


def make_draft_model(options: EngineOptions, spec: ModelSpec, limits: Limits) -> DraftModel:
    """The options' draft model for a model with this `spec`, with at most the same context."""
    from mnemos.engine.draft_model import DraftModel

    model = options.draft_model
    if not _is_model(model):
        model = _adapt(model, None, replace(options, context_length=spec.context_length))
    own: ModelSpec = model.spec
    if own.vocabulary_size != spec.vocabulary_size:
        raise ConfigError(
            f"draft_model has a vocabulary of {own.vocabulary_size} tokens and the model one of "
            f"{spec.vocabulary_size}; drafting needs the same one"
        )
    if isinstance(model, ConditionedModel):
        raise ConfigError(f"draft_model is a {own.architecture}, which has an encoder and cannot draft")
    length = min(own.context_length, spec.context_length)
    shorter = replace(own, context_length=length)
    capacity = reserve(model, shorter, options.cache_tokens, limits.sequences, limits.batch_tokens)
    return DraftModel(model, capacity, replace(limits, context_length=length))


def _is_model(model: Any) -> bool:
    return isinstance(getattr(model, "spec", None), ModelSpec)


def _adapt(module: Any, tokenizer: Tokenizer | None, options: ModelOptions) -> Model:
    from mnemos.models.load import adapt

    return adapt(
        module,
        device=options.device,
        use_kv_cache=options.use_kv_cache,
        context_length=options.context_length,
        vocabulary_size=None if tokenizer is None else tokenizer.vocabulary_size,
    )


def default_length(new_tokens: int, fields: Mapping[str, Any], spec: ModelSpec) -> dict[str, int]:
    """The fields of a length that nobody asked for: `new_tokens`, or what the context has room for.

    fields: what was asked for.
    """
    match fields.get("overflow"):
        case "sliding":
            return {"max_new_tokens": new_tokens}
        case "truncate_left":  # leaves room for that many
            return {"max_new_tokens": min(new_tokens, max(spec.context_length // 2, 1))}
        case _:
            return {"max_new_tokens": new_tokens, "max_length": spec.context_length}
