"""The kinds of decoding by their names, each as a config."""

from __future__ import annotations

from typing import Any

from mnemos.decoding.config import GenerationConfig


class DecodingStrategies:
    """A `GenerationConfig` for each kind of decoding, such as `DecodingStrategies.beam_search(num_beams=5)`.

    All take further fields of the config by name. ConfigError for a value outside its meaning.
    """

    @staticmethod
    def greedy(**fields: Any) -> GenerationConfig:
        """The most probable token each time."""
        return GenerationConfig(strategy="greedy", **fields)

    @staticmethod
    def temperature_sampling(temperature: float = 1.0, **fields: Any) -> GenerationConfig:
        """Tokens drawn from softmax(logits / temperature)."""
        return GenerationConfig(strategy="sampling", temperature=temperature, **fields)

    @staticmethod
    def top_k_sampling(top_k: int = 50, **fields: Any) -> GenerationConfig:
        """Tokens drawn among the `top_k` most probable ones. Fan et al. 2018, arXiv:1805.04833."""
        return GenerationConfig(strategy="top_k", top_k=top_k, **fields)

    @staticmethod
    def top_p_sampling(top_p: float = 0.9, **fields: Any) -> GenerationConfig:
        """Tokens drawn among the fewest that together reach `top_p`. Holtzman et al. 2019, arXiv:1904.09751."""
        return GenerationConfig(strategy="top_p", top_p=top_p, **fields)

    @staticmethod
    def beam_search(num_beams: int = 4, **fields: Any) -> GenerationConfig:
        """The most probable text of a search that keeps `num_beams` at a time."""
        return GenerationConfig(strategy="beam_search", num_beams=num_beams, **fields)

    @staticmethod
    def contrastive_search(top_k: int = 4, penalty_alpha: float = 0.6, **fields: Any) -> GenerationConfig:
        """Of `top_k` probable tokens the one least like the text so far. Su et al. 2022, arXiv:2202.06417."""
        return GenerationConfig(strategy="contrastive", top_k=top_k, penalty_alpha=penalty_alpha, **fields)
