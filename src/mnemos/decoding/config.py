"""How a text is generated: one dataclass, validated when it is created."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from mnemos.decoding.conflicts import check_conflicts
from mnemos.decoding.fields import ALIASES, CONSTRAINTS, FIELDS, INACTIVE, SAMPLING_ONLY, STRATEGIES, refuse_unknown
from mnemos.decoding.transformers_objects import derives
from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.decoding.memory import Memory

LogitsProcessor = Callable[[Sequence[int], npt.NDArray[np.float32]], "npt.NDArray[np.float32] | None"]
PrefixFunction = Callable[[int, npt.NDArray[np.int64]], Sequence[int]]
StoppingCriterion = Callable[[Sequence[int]], bool]

DEFAULT_NEW_TOKENS = 256
DEFAULT_BEAMS = 4
DEFAULT_CANDIDATES = 4
# Defaults for the strategies that are named after one parameter.
NAMED_DEFAULTS: dict[str, dict[str, float | int]] = {
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "nucleus": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.9},
    "contrastive": {"top_k": DEFAULT_CANDIDATES, "penalty_alpha": 0.6},
    "diverse_beam_search": {"num_beam_groups": 2, "diversity_penalty": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a text is generated, with the names that users of Hugging Face, OpenAI and vLLM know.

    Without a sampling or search parameter, decoding is greedy. `do_sample`, a temperature above 0, or a top_k, top_p,
    min_p, typical_p or other cut-off that has an effect turns on sampling; `num_beams` turns on beam search
    (deterministic unless do_sample=True); `penalty_alpha` turns on contrastive search. `strategy` names one explicitly.
    A value that is not allowed, or a pair of values that contradict each other, raises a `ConfigError` with the field,
    the value and the rule. A field that has no use in a decoding may hold a value that changes nothing (top_p 1.0,
    num_beams 1, ...), and beside a named strategy also other libraries' defaults: top_k 50 and top_p 0.9 where it does
    not sample, do_sample False where it does. With do_sample=False, all sampling parameters are ignored.

    Logits are changed in Hugging Face's order: DoLa, biases, repetition, presence and frequency penalties, DRY,
    n-grams, bad words, lengths, allowed, forced and suppressed tokens, `logits_processors`, constraints, temperature,
    top_n_sigma, top_k, top_p, min_p, typical_p, epsilon, eta, XTC, mirostat.

    None for any field means its default. The fields, each with its allowed values and default:
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    exponential_decay_length_penalty: Sequence[float] | None = None
    max_time: float | None = None
    overflow: str = "error"
    strategy: str | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float = 0.1
    mirostat: int | None = None
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: str | Sequence[str] = ("\n", ":", '"', "*")
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    stop_when_repeating: bool = False
    bad_words: str | Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    logit_bias: Mapping[int, float] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None = None
    allowed_token_ids: int | Sequence[int] | None = None
    prefix_allowed_tokens_fn: PrefixFunction | None = None
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = ()
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | Sequence[int] | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: int | Sequence[int] = ()
    eos_token_id: int | Sequence[int] | None = None
    ignore_eos: bool = False
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | Sequence[int] | None = None
    dola_layers: str | int | Sequence[int] | None = None
    json_schema: dict[str, Any] | str | bool | None = None
    strict: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    num_return_sequences: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculative: str | None = None
    draft_tokens: int | None = None
    priority: int = 0
    tenant: str = "default"
    deadline: float | None = None
    cache_salt: str | None = None
    adapter: str | None = None
    memory: Memory | Mapping[str, Any] | str | bool | None = None
    n: InitVar[int | None] = None
    max_tokens: InitVar[int | None] = None
    min_tokens: InitVar[int | None] = None

    def __new__(cls, *values: Any, **named: Any) -> GenerationConfig:
        refuse_unknown(named)
        if values:
            raise ConfigError(f"GenerationConfig got {values[0]!r} without a name; give every value by its name")
        return super().__new__(cls)

    def __post_init__(self, n: int | None, max_tokens: int | None, min_tokens: int | None) -> None:
        self._take_alias("n", n)
        self._take_alias("max_tokens", max_tokens)
        self._take_alias("min_tokens", min_tokens)
        for field in FIELDS:
            if (value := getattr(self, field.name)) is not field.default:
                object.__setattr__(self, field.name, field.normal(value))
        for name, value in NAMED_DEFAULTS.get(self.strategy or "", {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_conflicts(self)

    def _take_alias(self, alias: str, value: int | None) -> None:
        name = ALIASES[alias]
        if value is not None:
            default = type(self).__dataclass_fields__[name].default
            other = getattr(self, name)
            if other is not default and other != value:
                raise ConfigError(f"{alias} is {value!r} and {name} is {other!r}; they are two names of one field")
            object.__setattr__(self, name, value)
        object.__setattr__(self, alias, getattr(self, name))

    def with_overrides(self, **changes: Any) -> GenerationConfig:
        """A new config in which `changes` replace this one's values; validated like any other."""
        refuse_unknown(changes)
        current = {field.name: getattr(self, field.name) for field in fields(self)}
        for alias, name in ALIASES.items():
            if alias in changes:
                current.pop(name)
        return GenerationConfig(**{**current, **changes})

    @cached_property
    def active(self) -> frozenset[str]:
        """The names of the fields whose values have an effect."""
        changed = [field.name for field in FIELDS if getattr(self, field.name) is not field.default]
        return frozenset([name for name in changed if getattr(self, name) not in INACTIVE[name]])

    @cached_property
    def mode(self) -> str:
        """The kind of decoding: greedy, sampling, beam or contrastive."""
        mode = STRATEGIES[self.strategy] if self.strategy is not None else self._implied_mode
        return "greedy" if mode == "sampling" and self.temperature == 0 else mode

    @property
    def _implied_mode(self) -> str:
        if "num_beams" in self.active:
            return "beam"
        if "penalty_alpha" in self.active:
            return "contrastive"
        if self.do_sample is not None:
            return "sampling" if self.do_sample else "greedy"
        wanted = self.temperature is not None or not self.active.isdisjoint(SAMPLING_ONLY)
        return "sampling" if wanted else "greedy"

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random."""
        if self.mode == "beam":
            asked = self.strategy in (None, "beam_search") and self.do_sample is True
            return asked or self.strategy == "beam_sampling"
        return self.mode == "sampling"

    @property
    def beams(self) -> int:
        """The number of beams; 1 unless decoding is by beam search."""
        if self.mode != "beam":
            return 1
        return DEFAULT_BEAMS if self.num_beams is None else self.num_beams

    @property
    def groups(self) -> int:
        """The number of groups that the beams are divided into."""
        return self.num_beam_groups or 1

    @property
    def constraint(self) -> str | None:
        """The name of the field that constrains the text, if one does."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """The end-of-text tokens that replace the model's own; None keeps the model's."""
        return None if self.eos_token_id is None else tuple(np.atleast_1d(self.eos_token_id).tolist())


def _described() -> str:
    """The fields, for the docstring that an editor or help() shows."""
    lines = []
    for field in FIELDS:
        default = "" if field.default is None else f"; by default {field.default!r}"
        lines.append(f"    {field.name}: {field.help} Must be {field.rule.meaning}{default}.")
    return "\n".join(lines)


GenerationConfig.__doc__ = f"{GenerationConfig.__doc__}\n{_described()}\n"


class TransformersConfig(Protocol):
    """The GenerationConfig of transformers."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The values that differ from the defaults."""


AnyConfig = GenerationConfig | Mapping[str, Any] | TransformersConfig


def is_config(value: object) -> bool:
    """True for what `as_config` accepts."""
    return isinstance(value, (GenerationConfig, Mapping)) or derives(value, {"GenerationConfig"})


def as_config(value: AnyConfig) -> GenerationConfig:
    """A GenerationConfig as it is; one made from a mapping of fields, or from the GenerationConfig of transformers.

    ConfigError for anything else, for values that are not allowed and for fields that do not exist.
    """
    if isinstance(value, GenerationConfig):
        return value
    if not is_config(value):
        raise ConfigError(f"config is of type {type(value).__name__}; give a GenerationConfig, or a dict of its fields")
    from mnemos.decoding.transformers_config import is_foreign, read_foreign

    if is_foreign(value):
        return GenerationConfig(**read_foreign(value))
    return GenerationConfig(**cast("Mapping[str, Any]", value))


def make_config(config: AnyConfig | None = None, **overrides: Any) -> GenerationConfig:
    """`config`, or the default one, with some fields replaced. Raises ConfigError for a value that is not allowed."""
    if config is None:
        return GenerationConfig(**overrides)
    own = as_config(config)
    return own.with_overrides(**overrides) if overrides else own


def with_defaults(defaults: GenerationConfig, **given: Any) -> GenerationConfig:
    """`defaults` with what is given in their place.

    Where that contradicts their kind of decoding (strategy="greedy" beside a default temperature, say), what they say
    of sampling and search gives way. ConfigError for what is wrong in itself.
    """
    try:
        return make_config(defaults, **given)
    except ConfigError:
        plain = {field.name: field.default for field in FIELDS if field.group in ("sampling", "search")}
        return defaults.with_overrides(**{**plain, "strategy": None, "do_sample": None}).with_overrides(**given)


def choose_config(
    config: AnyConfig | None,
    default: GenerationConfig | None,
    *,
    generation_config: AnyConfig | None = None,
    **given: Any,
) -> GenerationConfig:
    """A request's config: its own, else `default`, with what is given in the place of their fields.

    generation_config: another name of `config`. ConfigError where what is given contradicts the request's own config; a
    default gives way instead.
    """
    if generation_config is not None:
        if config is not None:
            raise ConfigError("config and generation_config are both given; they are two names of one thing")
        config = generation_config
    if config is None and default is not None:
        return with_defaults(default, **given)
    return make_config(config, **given)
