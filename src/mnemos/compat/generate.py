"""Generation with a model of one's own in one call, without keeping an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    do_sample: bool = True,
    device: str | None = None,
    **overrides: Any,
) -> str:
    """The text that continues `prompt`.

    model, tokenizer, device: as of `InferenceEngine`. max_new_tokens: 256 if not given, or what the context has room
    for. With do_sample=False decoding is greedy, and temperature, top_p
    and top_k have no effect. `overrides` are further fields of `GenerationConfig`. Whoever generates often makes an
    `InferenceEngine` once, which saves trying the model out each time.
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
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    do_sample: bool = True,
    device: str | None = None,
    **overrides: Any,
) -> list[str]:
    """The texts that continue `prompts`, in their order, evaluated together; parameters as of `generate`."""
    from mnemos.engine.engine import InferenceEngine
    from mnemos.engine.prompts import listed

    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}
    with InferenceEngine(model, tokenizer, device) as engine:
        texts: list[str] = engine.generate(listed(prompts), max_new_tokens=max_new_tokens, **{**sampling, **overrides})
        return texts
