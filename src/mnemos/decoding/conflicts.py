"""Which fields of `GenerationConfig` contradict each other: a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mnemos.decoding.fields import CONSTRAINTS, FIELDS, HABITUAL, ONLY
from mnemos.errors import ConfigError, shown

_ONLY = {only: tuple(field.name for field in FIELDS if field.only == only) for only in ONLY}


class Config(Protocol):
    """The part of a config that the table reads, apart from fields that FIELDS restricts to one decoding."""

    @property
    def active(self) -> frozenset[str]: ...
    @property
    def mode(self) -> str: ...
    @property
    def samples(self) -> bool: ...
    @property
    def beams(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def strategy(self) -> str | None: ...
    @property
    def do_sample(self) -> bool | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def max_new_tokens(self) -> int | None: ...
    @property
    def min_new_tokens(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def min_length(self) -> int: ...
    @property
    def num_return_sequences(self) -> int: ...
    @property
    def best_of(self) -> int | None: ...
    @property
    def speculative(self) -> str | None: ...
    @property
    def draft_tokens(self) -> int | None: ...
    @property
    def stop_when_repeating(self) -> bool: ...
    @property
    def overflow(self) -> str: ...
    @property
    def prompt_logprobs(self) -> int | None: ...
    @property
    def json_schema(self) -> object: ...
    @property
    def strict(self) -> bool: ...
    @property
    def dola_layers(self) -> object: ...
    @property
    def guidance_scale(self) -> float | None: ...
    @property
    def negative_prompt(self) -> str | Sequence[int] | None: ...


@dataclass(frozen=True)
class Conflict:
    """`fields(config)` names the fields that contradict the rest of the config; `rule` says why."""

    fields: Callable[[Config], Sequence[str]]
    rule: str


def _ignored(config: Config, name: str) -> bool:
    """True if a sampling field is not needed, and setting it is not a mistake."""
    if config.do_sample is False or (config.mode == "greedy" and config.temperature == 0):
        return True  # explicit: the most probable token, whatever is cut off
    if name == "top_k" and config.mode == "contrastive":
        return True
    return config.strategy is not None and getattr(config, name) in HABITUAL.get(name, ())


def _misplaced(config: Config, only: str) -> list[str]:
    """The fields that only have an effect in the decoding `only` but were given in another."""
    if config.active.isdisjoint(_ONLY[only]):
        return []
    fits = {
        "sampling": config.samples,
        "beam": config.mode == "beam",
        "contrastive": config.mode == "contrastive",
        "one text": config.mode in ("greedy", "sampling"),
    }[only]
    if fits:
        return []
    given = [name for name in _ONLY[only] if name in config.active]
    return [name for name in given if only != "sampling" or not _ignored(config, name)]


def _if(condition: bool, *fields: str) -> Sequence[str]:
    return fields if condition else ()


CONFLICTS: tuple[Conflict, ...] = (
    *(Conflict(partial(_misplaced, only=only), rule) for only, rule in ONLY.items()),
    Conflict(
        lambda c: _if(c.samples and c.temperature == 0, "temperature"),
        "it must be above 0 for beams that are drawn at random",
    ),
    Conflict(
        # Configs that do not mention it hold False: a strategy that is named samples all the same.
        lambda c: _if(
            c.strategy is not None and c.do_sample is True and not c.samples and not _ignored(c, "do_sample"),
            "do_sample",
        ),
        "it contradicts the strategy",
    ),
    Conflict(
        lambda c: _if(c.mode == "contrastive" and c.do_sample is True, "do_sample"),
        "contrastive search is deterministic",
    ),
    Conflict(
        lambda c: _if(c.mode == "contrastive" and c.top_k is not None and not 2 <= c.top_k <= 256, "top_k"),
        "contrastive search weighs 2 to 256 candidates",
    ),
    Conflict(
        lambda c: _if(c.mode != "beam" and "num_beams" in c.active, "num_beams"), "only beam search has several beams"
    ),
    Conflict(lambda c: _if(c.beams % c.groups != 0, "num_beam_groups"), "it must divide num_beams"),
    Conflict(
        lambda c: _if("diversity_penalty" in c.active and c.groups == 1, "diversity_penalty"),
        "it needs num_beam_groups of at least 2",
    ),
    Conflict(
        lambda c: _if(c.mode == "beam" and c.groups > 1 and c.samples, "num_beam_groups"),
        "groups of beams are deterministic: leave out do_sample",
    ),
    Conflict(
        lambda c: _if(c.mode == "beam" and c.num_return_sequences > c.beams, "num_return_sequences"),
        "beam search returns at most num_beams sequences",
    ),
    Conflict(
        lambda c: _if(
            c.num_return_sequences > 1 and (c.mode == "contrastive" or (c.mode == "greedy" and c.temperature != 0)),
            "num_return_sequences",
        ),
        "a deterministic strategy has one result: sample, or set num_beams",
    ),
    Conflict(
        lambda c: _if("best_of" in c.active and c.mode != "sampling", "best_of"), "it only has an effect when sampling"
    ),
    Conflict(
        lambda c: _if(c.best_of is not None and c.best_of < c.num_return_sequences, "best_of"),
        "it must be at least num_return_sequences",
    ),
    Conflict(
        lambda c: [name for name in CONSTRAINTS if name in c.active][1:],
        "a request has one constraint: json_schema, regex, choice or grammar",
    ),
    Conflict(lambda c: _if(c.strict and c.json_schema is None, "strict"), "it needs json_schema"),
    Conflict(
        lambda c: _if(c.draft_tokens is not None and c.speculative is None, "draft_tokens"), "it needs speculative"
    ),
    Conflict(
        lambda c: _if(c.max_new_tokens == 0 and c.prompt_logprobs is None, "max_new_tokens"),
        "it must be at least 1; to score a prompt alone, set prompt_logprobs too, or call score() or logits()",
    ),
    Conflict(
        lambda c: _if(c.prompt_logprobs is not None and c.overflow == "sliding", "prompt_logprobs"),
        "an endless text drops tokens of its prompt, which cannot be scored then",
    ),
    Conflict(
        lambda c: _if(c.negative_prompt is not None and "guidance_scale" not in c.active, "negative_prompt"),
        "it needs a guidance_scale other than 1",
    ),
    Conflict(
        lambda c: _if(c.mode == "contrastive" and "guidance_scale" in c.active, "guidance_scale"),
        "contrastive search compares hidden states, which guidance does not change",
    ),
    Conflict(
        lambda c: [
            name
            for name in ("guidance_scale", "speculative", "prompt_logprobs")
            if c.dola_layers is not None and name in c.active
        ],
        "it does not work with dola_layers",
    ),
    Conflict(
        lambda c: _if("guidance_scale" in c.active and c.speculative == "draft", "speculative"),
        "a draft model does not guess guided texts; prompt_lookup works",
    ),
    Conflict(
        lambda c: _if("guidance_scale" in c.active and c.overflow == "sliding", "guidance_scale"),
        "an endless text and its negative prompt would be cut in different places",
    ),
    Conflict(
        lambda c: _if(c.max_new_tokens is not None and c.min_new_tokens > c.max_new_tokens, "min_new_tokens"),
        "it must not exceed max_new_tokens",
    ),
    Conflict(
        lambda c: _if(c.max_length is not None and c.min_length > c.max_length, "min_length"),
        "it must not exceed max_length",
    ),
    Conflict(
        lambda c: _if(c.mode == "beam" and c.stop_when_repeating, "stop_when_repeating"),
        "beams are compared at the end; loops are noticed in greedy decoding, sampling and contrastive search",
    ),
    Conflict(
        lambda c: _if(c.mode in ("beam", "contrastive") and c.overflow == "sliding", "overflow"),
        "an endless text needs greedy decoding or sampling",
    ),
)


def check_conflicts(config: Config) -> None:
    """Raises ConfigError for the first row of the table that applies."""
    for conflict in CONFLICTS:
        for field in conflict.fields(config):
            raise ConfigError(
                f"{field} is {shown(getattr(config, field))} with {config.mode} decoding; {conflict.rule}"
            )
