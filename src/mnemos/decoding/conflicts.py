"""Which fields of `GenerationConfig` contradict each other: a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnemos.errors import ConfigError, shown

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig

CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS_ONLY = ("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
# A value that changes nothing fits every strategy: clients send such values out of habit.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "penalty_alpha": (0.0,),
}
# What other libraries' configs hold unless one says otherwise. Where `strategy` or do_sample=False says outright that
# nothing is sampled, such a value came along with the rest of a config and is ignored; elsewhere it is a wish.
HABITUAL: dict[str, tuple[Any, ...]] = {"top_k": (50,), "top_p": (0.9,)}


def active(config: GenerationConfig, field: str) -> bool:
    """True if the field was given a value that has an effect."""
    value = getattr(config, field)
    return value is not None and value != () and value not in NEUTRAL.get(field, ())


def _given(config: GenerationConfig, fields: Sequence[str]) -> list[str]:
    return [field for field in fields if active(config, field)]


def _came_along(config: GenerationConfig, field: str) -> bool:
    """True if the field holds another library's default beside a clear word that it is not needed."""
    outright = config.strategy is not None or config.do_sample is False
    return outright and getattr(config, field) in HABITUAL.get(field, ())


@dataclass(frozen=True)
class Conflict:
    """`fields(config)` names the fields that contradict the rest of the config; `rule` says why."""

    fields: Callable[[GenerationConfig], Sequence[str]]
    rule: str


def _if(condition: bool, *fields: str) -> Sequence[str]:
    return fields if condition else ()


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda c: (
            [
                name
                for name in _given(c, SAMPLING_ONLY)
                if not _came_along(c, name) and (name != "top_k" or c.mode != "contrastive")
            ]
            if not c.samples
            and not (c.mode == "greedy" and c.temperature == 0)  # the limit of sampling, whatever is cut off
            else ()
        ),
        "it only has a meaning when sampling: set do_sample=True, or leave it out",
    ),
    Conflict(
        lambda c: _if(c.samples and c.temperature == 0, "temperature"),
        "it must be above 0 when sampling is asked for: without do_sample and strategy, 0 means greedy",
    ),
    Conflict(
        # False is what configs hold that say nothing of it: a strategy that is named samples all the same.
        lambda c: _if(c.strategy is not None and c.do_sample is True and not c.samples, "do_sample"),
        "it contradicts the strategy",
    ),
    Conflict(
        lambda c: _if(c.mode == "contrastive" and c.do_sample is True, "do_sample"),
        "contrastive search is deterministic",
    ),
    Conflict(
        lambda c: _if(c.mode != "contrastive" and active(c, "penalty_alpha"), "penalty_alpha"),
        "only contrastive search has it",
    ),
    Conflict(
        lambda c: _if(c.mode == "contrastive" and c.top_k is not None and not 2 <= c.top_k <= 256, "top_k"),
        "contrastive search weighs 2 to 256 candidates",
    ),
    Conflict(
        lambda c: _if(c.mode != "beam" and active(c, "num_beams"), "num_beams"), "only beam search has several beams"
    ),
    Conflict(lambda c: _given(c, BEAMS_ONLY) if c.mode != "beam" else (), "only beam search has it: set num_beams"),
    Conflict(lambda c: _if(c.beams % c.groups != 0, "num_beam_groups"), "it must divide num_beams"),
    Conflict(
        lambda c: _if(active(c, "diversity_penalty") and c.groups == 1, "diversity_penalty"),
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
        lambda c: _if(c.mode in ("greedy", "contrastive") and c.num_return_sequences > 1, "num_return_sequences"),
        "a deterministic strategy has one result: sample, or set num_beams",
    ),
    Conflict(
        lambda c: _if(c.best_of is not None and c.mode != "sampling", "best_of"), "it only has a meaning when sampling"
    ),
    Conflict(
        lambda c: _if(c.best_of is not None and c.best_of < c.num_return_sequences, "best_of"),
        "it must be at least num_return_sequences",
    ),
    Conflict(
        lambda c: _given(c, CONSTRAINTS)[1:], "a request has one constraint: json_schema, regex, choice or grammar"
    ),
    Conflict(
        lambda c: _given(c, CONSTRAINTS) if c.mode not in ("greedy", "sampling") else (),
        "constraints go with greedy decoding and sampling",
    ),
    Conflict(
        lambda c: _if(c.speculative is not None and c.mode not in ("greedy", "sampling"), "speculative"),
        "speculation goes with greedy decoding and sampling",
    ),
    Conflict(
        lambda c: _if(c.draft_tokens is not None and c.speculative is None, "draft_tokens"), "it needs speculative"
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
        "an endless text goes with greedy decoding and sampling",
    ),
)


def check_conflicts(config: GenerationConfig) -> None:
    for conflict in CONFLICTS:
        for field in conflict.fields(config):
            raise ConfigError(
                f"{field} is {shown(getattr(config, field))} with {config.mode} decoding; {conflict.rule}"
            )
