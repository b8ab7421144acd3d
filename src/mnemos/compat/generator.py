"""Generates texts from a training checkpoint and its tokenizer's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mnemos.compat.batching import check_one
from mnemos.decoding.config import GenerationConfig, with_defaults
from mnemos.engine.engine import LENGTHS, InferenceEngine
from mnemos.engine.prepare import default_length
from mnemos.engine.pretrained import read_tokenizer
from mnemos.engine.prompts import listed
from mnemos.errors import ConfigError

DEFAULT_LENGTH = 50


class Generator:
    """A checkpoint ({'model_args': ..., 'model': state_dict} or any model that Mnemos reads), ready to generate.

    checkpoint_path   see `InferenceEngine.from_pretrained`, whose options are accepted too
    tokenizer_path    a tokenizer.json, a SentencePiece model, or a folder with one of them; or a tokenizer itself
    device            "cpu" for the native backend; any other is a PyTorch device, such as "cuda"
    """

    def __init__(
        self,
        checkpoint_path: str | os.PathLike[str],
        tokenizer_path: str | os.PathLike[str] | Any,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        if tokenizer_path is None:
            raise ConfigError("tokenizer_path is None; expected the path of a tokenizer, or a tokenizer")
        self.tokenizer = read_tokenizer(tokenizer_path)
        options = {"device": device, "tokenizer": self.tokenizer, **options}
        self.engine = InferenceEngine.from_pretrained(checkpoint_path, **options)
        self.model = self.engine.model

    def generate(
        self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.7, top_p: float = 0.9, **overrides: Any
    ) -> str:
        """The prompt and the text that continues it. With temperature 0, the most probable token is always chosen.

        max_new_tokens: the default, 50, also means what a smaller context has room for. RequestError for several texts
        (num_return_sequences), which `engine.generate` returns.
        """
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
        config = self._config(max_new_tokens, temperature, top_p, overrides)
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None  # the constructor's
        ids = [tokenizer.encode(prompt) for prompt in listed(prompts)]
        rows = self.engine.generate_batched(ids, batch_size=batch_size, config=config)
        return [tokenizer.decode(row) for row in rows]

    def generate_stream(
        self, prompt: str, max_new_tokens: int = 50, temperature: float = 0.7, top_p: float = 0.9, **overrides: Any
    ) -> Iterator[int]:
        """The new tokens' ids as they come; `engine.stream` gives their texts too."""
        stream = self.engine.stream(prompt, self._config(max_new_tokens, temperature, top_p, overrides))
        return (token.token_id for token in stream if token.token_id is not None)

    def _config(
        self, max_new_tokens: int, temperature: float, top_p: float, overrides: Mapping[str, Any]
    ) -> GenerationConfig:
        """Sampling, unless the caller asks for another kind of decoding; one text."""
        length: dict[str, int] = {"max_new_tokens": max_new_tokens}
        if max_new_tokens == DEFAULT_LENGTH:
            length = {} if LENGTHS & overrides.keys() else default_length(max_new_tokens, overrides, self.engine.spec)
        config = with_defaults(GenerationConfig(temperature=temperature, top_p=top_p), **{**length, **overrides})
        check_one(config)
        return config
