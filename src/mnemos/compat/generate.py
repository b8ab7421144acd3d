"""Generation with your own model in one call, without keeping an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int | None = 256,
    temperature: float | None = 0.7,
    top_p: float | None = 0.9,
    top_k: int | None = 50,
    do_sample: bool = True,
    device: str | None = None,
    **overrides: Any,
) -> str:
    """The text that continues `prompt`.

    model, tokenizer, device: see `InferenceEngine`. max_new_tokens: the default, 256, also means what a smaller context
    has room for; more than fit are refused.
    With do_sample=False, decoding is greedy, and temperature, top_p and top_k have no effect; nor do they if the
    temperature is 0 or `overrides`, further fields of `GenerationConfig`, ask for beams or contrastive search.
    For more than one call, create an `InferenceEngine` once, which avoids probing the model each time.
    """
    return generate_batch(
        model,
        tokenizer,
        [prompt],
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        do_sample,
        device,
        **overrides,
    )[0]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int | None = 256,
    temperature: float | None = 0.7,
    top_p: float | None = 0.9,
    top_k: int | None = 50,
    do_sample: bool = True,
    device: str | None = None,
    **overrides: Any,
) -> list[str]:
    """The texts that continue `prompts`, in their order, evaluated together; for the parameters see `generate`."""
    from mnemos.decoding.config import DEFAULT_NEW_TOKENS, GenerationConfig, with_defaults
    from mnemos.engine.engine import InferenceEngine
    from mnemos.engine.prompts import listed

    defaults = GenerationConfig()
    if do_sample:
        warmth = 1.0 if temperature is None else temperature
        defaults = GenerationConfig(temperature=warmth, top_p=top_p, top_k=top_k)
    length = None if max_new_tokens == DEFAULT_NEW_TOKENS else max_new_tokens
    config = with_defaults(defaults, max_new_tokens=length, **overrides)
    with InferenceEngine(model, tokenizer, device) as engine:
        texts: list[str] = engine.generate(listed(prompts), config=config)
        return texts
