"""What each field of `GenerationConfig` may hold: a table of rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mnemos.errors import ConfigError
from mnemos.rules import FLAG, LARGEST_INT, Rule, hint, one_of, real, several, text, whole


def _filled(rule: Rule) -> Rule:
    return Rule(lambda value: rule.check(value) or None, f"not empty and {rule.meaning}")


def _bias(value: Any) -> dict[int, float] | None:
    if not isinstance(value, Mapping) or len(value) > 65536:
        return None
    token, amount = _TOKEN.check, real(-100, 100).check
    pairs = {}
    for key, bias in value.items():
        number = token(int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key)
        strength = amount(bias)
        if number is None or strength is None:
            return None
        pairs[number] = strength
    return pairs


def _temperature(value: Any) -> float | None:
    number: float | None = real(0, 100).check(value)
    return None if number is not None and 0 < number < 1e-10 else number


def _early(value: Any) -> bool | str | None:
    return value if isinstance(value, bool) or (isinstance(value, str) and value == "never") else None


def _callable(value: Any) -> Any:
    return value if callable(value) else None


def _schema(value: Any) -> Any:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        small = isinstance(schema, (dict, bool)) and len(json.dumps(schema, allow_nan=False)) <= 1 << 20
    except (ValueError, TypeError, RecursionError):
        return None
    return value if small else None


_TOKEN = whole(0)
_LONG_TEXT = text(1 << 20)
_EARLY = Rule(_early, 'True, False or "never"')

STRATEGIES = {
    "greedy": "greedy",
    "sampling": "sampling",
    "top_k": "sampling",
    "top_p": "sampling",
    "nucleus": "sampling",
    "min_p": "sampling",
    "typical": "sampling",
    "beam_search": "beam",
    "diverse_beam_search": "beam",
    "beam_sampling": "beam",
    "contrastive": "contrastive",
}

RULES: dict[str, Rule] = {
    "strategy": one_of(*STRATEGIES),
    "max_new_tokens": whole(1),
    "max_length": whole(1),
    "min_new_tokens": whole(0),
    "min_length": whole(0),
    "do_sample": FLAG,
    "temperature": Rule(_temperature, "0 (always the most probable token) or a number from 1e-10 to 100"),
    "top_k": whole(0),
    "top_p": real(0, 1, open_low=True),
    "min_p": real(0, 1),
    "typical_p": real(0, 1, open_low=True),
    "epsilon_cutoff": real(0, 1, open_high=True),
    "eta_cutoff": real(0, 1, open_high=True),
    "repetition_penalty": real(0.01, 100),
    "encoder_repetition_penalty": real(0.01, 100),
    "presence_penalty": real(-2, 2),
    "frequency_penalty": real(-2, 2),
    "no_repeat_ngram_size": whole(0),
    "encoder_no_repeat_ngram_size": whole(0),
    "bad_words_ids": several(_filled(several(_TOKEN, 256, single=False)), 16384, single=False),
    "bad_words": several(text(1024), 16384),
    "logit_bias": Rule(_bias, "a mapping from token ids to numbers from -100 to 100"),
    "logits_processors": several(Rule(_callable, "a callable (token_ids, logits)"), 64),
    "seed": whole(0, 2**64 - 1),
    "stop": several(text(4096), 256),
    "stop_token_ids": several(_TOKEN, 4096),
    "eos_token_id": several(_TOKEN, 4096),
    "ignore_eos": FLAG,
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "forced_bos_token_id": several(_TOKEN, 1),
    "forced_eos_token_id": several(_TOKEN, 4096),
    "suppress_tokens": several(_TOKEN, 1 << 20),
    "begin_suppress_tokens": several(_TOKEN, 1 << 20),
    "stop_when_repeating": FLAG,
    "stopping_criteria": several(Rule(_callable, "a callable (token_ids) -> bool"), 64),
    "max_time": real(0, 1e9, open_low=True),
    "logprobs": whole(0, 100),
    "num_beams": whole(1, 256),
    "num_beam_groups": whole(1, 256),
    "diversity_penalty": real(0, 1e6),
    "length_penalty": real(-100, 100),
    "early_stopping": _EARLY,
    "num_return_sequences": whole(1, 1024),
    "best_of": whole(1, 1024),
    "penalty_alpha": real(0, 1),
    "json_schema": Rule(_schema, "a JSON schema: a dict, True or False, or JSON text of at most 1048576 characters"),
    "regex": _LONG_TEXT,
    "choice": _filled(several(text(65536), 16384, single=False)),
    "grammar": _LONG_TEXT,
    "speculative": one_of("prompt_lookup", "draft"),
    "draft_tokens": whole(1, 64),
    "priority": whole(-LARGEST_INT),
    "tenant": text(1024),
    "deadline": real(0, 1e9, open_low=True),
    "cache_salt": text(1024),
    "overflow": one_of("error", "truncate_left", "sliding"),
}
ALIASES = {"n": "num_return_sequences", "max_tokens": "max_new_tokens"}


def refuse_unknown(names: Iterable[str]) -> None:
    known = [*RULES, *ALIASES]
    for name in names:
        if name not in known:
            raise ConfigError(f"{name} is not a field of GenerationConfig; {hint(name, known, 'the fields')}")
