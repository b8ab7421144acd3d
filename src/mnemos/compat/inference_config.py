"""An engine's limits and the defaults of its texts in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine


@dataclass(frozen=True)
class InferenceConfig:
    """max_batch_size: sequences that run at once; max_seq_length: the longest sequence in tokens, prompt included;
    use_cache: keys and values are kept between steps. The others are sampling parameters, see `generation()`.
    ConfigError for a value that is not allowed."""

    max_batch_size: int = 32
    max_seq_length: int = 2048
    default_temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    use_cache: bool = True

    def __post_init__(self) -> None:
        from mnemos.rules import COUNT, FLAG

        COUNT.apply("max_batch_size", self.max_batch_size)
        COUNT.apply("max_seq_length", self.max_seq_length)
        FLAG.apply("use_cache", self.use_cache)
        self.generation()

    def generation(self, **overrides: Any) -> GenerationConfig:
        """The config for generating texts; `overrides` replace or add fields."""
        from mnemos.decoding.config import GenerationConfig

        fields = {
            "do_sample": True,
            "temperature": self.default_temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "max_length": self.max_seq_length,
        }
        return GenerationConfig(**{**fields, **overrides})

    def engine(self, model: Any, tokenizer: Any = None, device: str | None = None) -> InferenceEngine:
        """An engine within these limits, whose requests use `generation()` unless they specify otherwise."""
        from mnemos.engine.engine import InferenceEngine

        return InferenceEngine(
            model,
            tokenizer,
            device,
            self.use_cache,
            max_sequences=self.max_batch_size,
            generation_config=self.generation(),
        )
