"""transformers' GenerationConfig, an object or its dict, as fields of Mnemos's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mnemos.decoding.fields import FIELDS, advice
from mnemos.decoding.transformers_objects import derives
from mnemos.errors import ConfigError, shown

DEFAULT_TOP_K = 50  # theirs, where tokens are drawn and the config does not say
VERSION = "transformers_version"  # a dict that was saved from such a config has it
# What changes no token here: how they compute, and facts that the model says of itself.
_UNNEEDED = {
    VERSION,
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prefill_chunk_size",
    "remove_invalid_values",
    "speculation_type",
    "target_lookbehind",
    "use_cache",
    "use_mtp",
}
_NAMES = {name: field.name for field in FIELDS for name in (field.name, field.alias, *field.elsewhere) if name}


def is_foreign(config: object) -> bool:
    """True for transformers' GenerationConfig and for a dict that was saved from one."""
    return VERSION in config if isinstance(config, Mapping) else derives(config, {"GenerationConfig"})


def read_foreign(config: Any) -> dict[str, Any]:
    """The fields that such a config sets, with the meanings that transformers gives them.

    What it leaves out has its default there: nothing is drawn without do_sample, and then from top_k 50. Lengths are
    those of Mnemos. ConfigError for a parameter of transformers that has no equivalent; extras are named in a warning.
    """
    theirs = {} if isinstance(config, Mapping) else vars(type(config)())
    given = {
        name: value
        for name, value in (config if isinstance(config, Mapping) else vars(config)).items()
        if value is not None and value != theirs.get(name) and name not in _UNNEEDED and not name.startswith("_")
    }
    for shorter, longer in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if shorter in given:
            given.pop(longer, None)
    fields: dict[str, Any] = {"do_sample": bool(given.pop("do_sample", False))}
    if fields["do_sample"]:
        fields["top_k"] = DEFAULT_TOP_K
    if "prompt_lookup_num_tokens" in given:
        fields["speculative"] = "prompt_lookup"
    unknown = []
    for name, value in given.items():
        if name in _NAMES:
            fields[_NAMES[name]] = value
        elif value and name in theirs:
            raise ConfigError(f"{name} is {shown(value)} in transformers' GenerationConfig; {advice(name)}")
        elif value:
            unknown.append(name)
    if unknown:
        warnings.warn(f"generation config: without effect here: {', '.join(unknown)}", stacklevel=2)
    return fields
