"""Generates texts from a training checkpoint and its tokenizer's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mnemos.decoding.config import GenerationConfig, with_defaults
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.prompts import listed
from mnemos.text.tokenizer import Tokenizer


class Generator:
    """A checkpoint ({'model_args': ..., 'model': state_dict} or any model that Mnemos reads), ready to generate.

    checkpoint_path   see `InferenceEngine.from_pretrained`, whose options are accepted too
    tokenizer_path    a tokenizer.json, a SentencePiece model, or a folder with one of them; or a `Tokenizer`
    device            "cpu" for the native backend; any other is a PyTorch device, such as "cuda"
    """

    def __init__(
        self,
        checkpoint_path: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | Tokenizer,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        given = tokenizer_path
        self.tokenizer = given if isinstance(given, Tokenizer) else Tokenizer.from_file(os.fspath(given))
        options = {"device": device, "tokenizer": self.tokenizer, **options}
        self.engine = InferenceEngine.from_pretrained(checkpoint_path, **options)
        self.model = self.engine.model

    def generate(
        self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.7, top_p: float = 0.9, **overrides: Any
    ) -> str:
        """The prompt and the text that continues it. With temperature 0, the most probable token is always chosen."""
        return self.generate_batch([prompt], 1, max_new_tokens, temperature, top_p, **overrides)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        batch_size: int = 8,
        max_new_tokens: int = 50,
        temperature: float = 0.7,
        top_p: float = 0.9,
        **overrides: Any,
    ) -> list[str]:
        """Like `generate`, for many prompts, at most `batch_size` at once."""
        config = _config(temperature, top_p, overrides)
        ids = [self.tokenizer.encode(prompt) for prompt in listed(prompts)]
        rows = self.engine.generate_batched(ids, max_new_tokens, batch_size, config)
        return [self.tokenizer.decode(row) for row in rows]

    def generate_stream(
        self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.7, top_p: float = 0.9, **overrides: Any
    ) -> Iterator[int]:
        """The new tokens' ids as they come; `engine.stream` gives their texts too."""
        config = _config(temperature, top_p, overrides)
        stream = self.engine.stream(prompt, config, max_new_tokens=max_new_tokens)
        return (token.token_id for token in stream if token.token_id is not None)


def _config(temperature: float, top_p: float, overrides: Mapping[str, Any]) -> GenerationConfig:
    """Sampling, unless the caller asks for another kind of decoding."""
    return with_defaults(GenerationConfig(temperature=temperature, top_p=top_p), **overrides)
