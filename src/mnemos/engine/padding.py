"""Which token pads arrays of token ids, given and returned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.contract import ModelSpec

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.text.tokenizer import Tokenizer


def padding_id(config: GenerationConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> int | None:
    """What is padding in arrays without a mask, as in transformers: the pad token, unless it ends or begins texts."""
    pad_id = _pad_id(config, spec, tokenizer)
    ends = spec.eos_token_ids if config.eos_ids is None else config.eos_ids
    begins = config.pad_token_id is None and pad_id == getattr(tokenizer, "bos_id", None)
    return None if begins or pad_id in ends else pad_id


def filling_id(config: GenerationConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> int:
    """What fills up rows that end early: the pad token, else the first end-of-text token, else 0."""
    known = (_pad_id(config, spec, tokenizer), *spec.eos_token_ids[:1], 0)
    return next(token for token in known if token is not None)


def _pad_id(config: GenerationConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> int | None:
    """The config's pad token, else the model's, else the tokenizer's if the model's vocabulary has it."""
    for named in (config.pad_token_id, spec.pad_token_id):
        if named is not None:
            return named
    pad_id: int | None = getattr(tokenizer, "pad_id", None)
    return pad_id if pad_id is None or pad_id < spec.vocabulary_size else None
