"""How long prompts and texts may be: what a config asks for, within a model's context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mnemos.contract import ModelSpec
from mnemos.decoding.config import DEFAULT_NEW_TOKENS, GenerationConfig
from mnemos.errors import ContextLengthError, RequestError


def fit_prompt(config: GenerationConfig, prompt_ids: Sequence[int], spec: ModelSpec) -> list[int]:
    """The prompt as it will be evaluated: checked, and cut on the left where config.overflow says so.

    Raises RequestError for an empty prompt or a token outside the vocabulary, ContextLengthError for one that is too
    long. "truncate_left" leaves room for max_new_tokens (without one, for 256 but at most half the context).
    """
    if len(prompt_ids) == 0:
        raise RequestError("the prompt is empty; give at least one token")
    array = np.asarray(prompt_ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise RequestError(
            f"the prompt is an array of {array.dtype} with shape {array.shape}; give a list of token ids"
        )
    check_ids("the prompt", (int(array.min()), int(array.max())), spec)
    prompt: list[int] = array.tolist()
    if config.overflow != "truncate_left":
        return prompt
    wanted = config.max_new_tokens
    if wanted is None:
        wanted = min(DEFAULT_NEW_TOKENS, spec.context_length // 2)
    if wanted >= spec.context_length:
        raise ContextLengthError(
            f"max_new_tokens is {wanted}, which leaves no room for a prompt in the context of {spec.context_length}"
        )
    return prompt[-(spec.context_length - wanted) :]


def new_tokens(config: GenerationConfig, prompt_length: int, spec: ModelSpec) -> int:
    """The most tokens that may be generated. Raises ContextLengthError where the context is too small."""
    least = 0 if config.max_new_tokens == 0 else 1
    room = spec.context_length - prompt_length
    if room < least and config.overflow != "sliding":
        raise ContextLengthError(
            f"the prompt has {prompt_length} tokens, {least - room} more than fit "
            f"{'with one new token ' if least else ''}into the context of {spec.context_length}; shorten it, or set "
            "overflow"
        )
    limits = [] if config.max_new_tokens is None else [config.max_new_tokens]
    if config.max_length is not None:
        if config.max_length <= prompt_length:
            raise RequestError(
                f"max_length is {config.max_length}, but the prompt alone has {prompt_length} tokens; raise it, "
                "or give max_new_tokens"
            )
        limits.append(config.max_length - prompt_length)
    most = min(limits, default=DEFAULT_NEW_TOKENS)
    if config.overflow == "sliding":
        return most
    if config.max_new_tokens is not None and most > room:
        raise ContextLengthError(
            f"the prompt's {prompt_length} tokens and {most} new ones are {most - room} more than the context of "
            f"{spec.context_length}; lower max_new_tokens, or set overflow"
        )
    return min(most, room)


def check_ids(name: str, tokens: Iterable[int], spec: ModelSpec) -> None:
    """RequestError for a token outside the vocabulary; `name` is what has it."""
    for token in tokens:
        if not 0 <= token < spec.vocabulary_size:
            raise RequestError(
                f"{name} has the token id {token}; the vocabulary has ids from 0 to {spec.vocabulary_size - 1}"
            )
