"""An engine for one model file, with defaults for its responses."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mnemos.compat.memory_cache import MemoryCache
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.completion import StreamedToken
from mnemos.engine.engine import LENGTHS, InferenceEngine
from mnemos.engine.options import split
from mnemos.engine.pretrained import load_parts
from mnemos.errors import ConfigError, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mnemos.compat.hardware_optimizer import HardwareOptimizer
    from mnemos.engine.options import LoadKeywords
    from mnemos.engine.prompts import Prompts

DEFAULT_LENGTH = 512


class OptimizedInferenceEngine(InferenceEngine):
    """An `InferenceEngine` that answers texts with texts.

    model_path       see `InferenceEngine.from_pretrained`, whose options are accepted too; or a module or `Model` in
                     memory, with the options of `InferenceEngine`
    cache_size       how many pages of the prefix cache are kept for later requests; it has no effect with
                     prefix_cache=False, or for a model whose prefixes cannot be shared
    config           defaults for its requests: fields of `GenerationConfig`, beam_size for num_beams, cache_size, and
                     batch_size, the number of sequences that run at once
    hardware_config  max_memory_gb, thermal_throttle and performance_mode, the options of these names (see
                     `mnemos.engine.options.ModelOptions`), and use_neural_engine, which must be False
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | Any,
        cache_size: int = 1000,
        config: Mapping[str, Any] | None = None,
        hardware_config: Mapping[str, Any] | None = None,
        **options: Unpack[LoadKeywords],
    ) -> None:
        if hardware_config is not None:
            from mnemos.compat.hardware_optimizer import hardware_options

            options = {**hardware_options(hardware_config), **options}  # type: ignore[typeddict-item]
        self._hardware = dict(hardware_config or {})
        if not isinstance(config, Mapping | None):
            raise ConfigError(f"config is {shown(config)}; it must be a mapping, as {{'max_length': 512}}")
        settings = dict(config or {})
        cache_size = settings.pop("cache_size", cache_size)
        if "batch_size" in settings:
            options.setdefault("max_sequences", settings.pop("batch_size"))
        fields = generation_fields(settings)
        self._has_length = bool(LENGTHS & fields.keys())
        options.setdefault("generation_config", GenerationConfig(**fields))
        if isinstance(model_path, (str, os.PathLike)):
            loading, running = split(options)
            super().__init__(**load_parts(model_path, loading), **running)
        else:
            plain: dict[str, Any] = {**options}
            super().__init__(model_path, **plain)
        # The engine owns its memory cache, which must not keep it alive.
        self._memory_cache = MemoryCache(cache_size, weakref.proxy(self))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        cache_size: int = 1000,
        config: Mapping[str, Any] | None = None,
        hardware_config: Mapping[str, Any] | None = None,
        **options: Unpack[LoadKeywords],
    ) -> OptimizedInferenceEngine:
        """The same as the constructor."""
        return cls(source, cache_size, config, hardware_config, **options)

    @property
    def memory_cache(self) -> MemoryCache:
        """What is remembered between requests: pages of keys and values, concepts, and prompts."""
        return self._memory_cache

    def initialize_optimizations(self) -> HardwareOptimizer:
        """Has the engine follow the machine's heat and power from now on, in its performance mode or a balanced one.

        The result says what the machine is made of and changes the mode.
        """
        from mnemos.compat.hardware_optimizer import HardwareOptimizer

        return HardwareOptimizer(self, self._hardware)

    def generate_response(self, text: str, max_length: int | None = None, **overrides: Any) -> str:
        """The text that follows `text`. max_length counts the tokens of both; the default is the config's, else 512."""
        response: str = self.generate(text, **self._response_fields(max_length, overrides))
        return response

    def generate_tokens(self, text: str, max_length: int | None = None, **overrides: Any) -> Iterator[StreamedToken]:
        """The tokens of `generate_response` as they come, each with its id and text."""
        return self.stream(text, **self._response_fields(max_length, overrides))

    def _read(self, prompts: Any, attention_mask: Any, config: GenerationConfig) -> Prompts:
        wanted = super()._read(prompts, attention_mask, config)
        if config.cache_salt is None:  # what has one is nobody else's business
            for token_ids in wanted.token_ids:
                self._memory_cache.note(token_ids)
        return wanted

    def _response_fields(self, max_length: int | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        fields = generation_fields(overrides)
        if max_length is not None:
            fields["max_length"] = max_length
        elif not self._has_length and not LENGTHS & fields.keys():
            fields["max_length"] = DEFAULT_LENGTH
        return fields


def generation_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings in `GenerationConfig`'s names: beam_size is num_beams, drawn where a temperature is given."""
    fields = dict(settings)
    if "beam_size" in fields:
        fields["num_beams"] = fields.pop("beam_size")
        if fields["num_beams"] > 1 and "temperature" in fields:  # beams drawn at random
            fields.setdefault("do_sample", True)
    return fields
