"""How a text is to be generated: one dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.decoding.conflicts import CONSTRAINTS, SAMPLING_ONLY, active, check_conflicts
from mnemos.decoding.fields import ALIASES, RULES, STRATEGIES, refuse_unknown
from mnemos.errors import ConfigError

LogitsProcessor = Callable[[Sequence[int], npt.NDArray[np.float32]], "npt.NDArray[np.float32] | None"]
StoppingCriterion = Callable[[Sequence[int]], bool]

DEFAULT_NEW_TOKENS = 256
DEFAULT_BEAMS = 4
DEFAULT_CANDIDATES = 4
# What the strategies that are named after one parameter use when it is not given.
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
    """Parameters of a generation, named as users of Hugging Face, OpenAI and vLLM know them.

    Without a parameter of sampling or search, decoding is greedy. `do_sample`, a temperature above 0, or a top_k,
    top_p, min_p, typical_p or cut-off that has an effect makes it sampling; `num_beams` makes it beam search
    (deterministic unless do_sample=True); `penalty_alpha` makes it contrastive search. `strategy` says it outright.
    Every value outside its meaning, and every pair that contradicts itself, is a `ConfigError` that gives the
    field, the value and the rule. Where a field has no use, the value that changes nothing (top_p 1.0,
    num_beams 1, ...) is no contradiction. Nor are other libraries' defaults beside a named strategy: top_k 50 and top_p
    0.9 where that does not sample (or do_sample=False says so), do_sample False where it does. They are ignored.

    Length: max_new_tokens counts generated tokens, max_length prompt and generated tokens; the first reached ends
    the text. Without either, it ends after 256 new tokens. The min_ fields forbid stop tokens and ignore stop
    strings until reached.

    temperature 0 means greedy. Filters act in Hugging Face's order: repetition, presence and frequency penalties,
    n-grams, bad words, temperature, top_k, top_p, min_p, typical_p, epsilon, eta. presence and frequency penalties
    count generated tokens only, repetition_penalty the prompt too. encoder_repetition_penalty above 1 makes the tokens
    of what an encoder-decoder model reads (of the prompt, for others) more probable; encoder_no_repeat_ngram_size bans
    copying n-grams of it. `logits_processors` are called as f(token_ids,
    logits) with all ids so far and a float32 row (vocabulary,), which they change in place or replace by returning
    another.

    seed: same seed, same text, whatever else runs (None: a fresh one). Of n results the i-th has its own stream of
    the seed. stop: strings that end the text, which then ends before them. stop_token_ids end it as end-of-text
    does, but leave the token's own text out; eos_token_id replaces the model's own list; ignore_eos ignores that
    list. `stopping_criteria` are called as f(token_ids) -> bool; max_time is in seconds from the first step.
    stop_when_repeating ends a degenerate loop. logprobs: the number of most probable tokens to report beside the
    chosen one's log probability (0: that alone), of the model's own distribution. best_of samples that many and
    returns the num_return_sequences most probable a token. speculative: "prompt_lookup" or, by the engine's draft
    model, "draft" change the time only; draft_tokens is the most tokens drafted at once. json_schema, regex, choice,
    grammar (Lark) constrain the text. deadline: the longest wait in the queue, in seconds. n is num_return_sequences,
    max_tokens is max_new_tokens. None for any field means its default.

    As generation_config.json of Hugging Face models has them, and by default what the model's own says:
    forced_bos_token_id is the first token behind the one that a decoder starts with (the language to translate into,
    say), forced_eos_token_id the last one of a text that reaches its greatest length, suppress_tokens never come,
    begin_suppress_tokens do not come first. An empty list in their place takes what the model says back.
    """

    strategy: str | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    bad_words: str | Sequence[str] = ()
    logit_bias: Mapping[int, float] | None = None
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = ()
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: int | Sequence[int] = ()
    eos_token_id: int | Sequence[int] | None = None
    ignore_eos: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    forced_bos_token_id: int | Sequence[int] | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    stop_when_repeating: bool = False
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = ()
    max_time: float | None = None
    logprobs: int | None = None
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    best_of: int | None = None
    penalty_alpha: float | None = None
    json_schema: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    speculative: str | None = None
    draft_tokens: int | None = None
    priority: int = 0
    tenant: str = "default"
    deadline: float | None = None
    cache_salt: str | None = None
    overflow: str = "error"
    n: InitVar[int | None] = None
    max_tokens: InitVar[int | None] = None

    def __new__(cls, *values: Any, **named: Any) -> GenerationConfig:
        refuse_unknown(named)
        if values:
            raise ConfigError(f"GenerationConfig got {values[0]!r} without a name; give every value by its name")
        return super().__new__(cls)

    def __post_init__(self, n: int | None, max_tokens: int | None) -> None:
        self._take_alias("n", n)
        self._take_alias("max_tokens", max_tokens)
        for field in fields(self):
            value = getattr(self, field.name)
            normal = field.default if value is None else RULES[field.name].apply(field.name, value)
            object.__setattr__(self, field.name, normal)
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
        """A new config in which `changes` replace this one's values; checked like any other."""
        refuse_unknown(changes)
        current = {field.name: getattr(self, field.name) for field in fields(self)}
        for alias, name in ALIASES.items():
            if alias in changes:
                current.pop(name)
        return GenerationConfig(**{**current, **changes})

    @property
    def mode(self) -> str:
        """The kind of decoding: greedy, sampling, beam or contrastive."""
        if self.strategy is not None:
            return STRATEGIES[self.strategy]
        if active(self, "num_beams"):
            return "beam"
        if active(self, "penalty_alpha"):
            return "contrastive"
        return "sampling" if self.samples else "greedy"

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random."""
        if self.strategy is not None:
            return STRATEGIES[self.strategy] == "sampling" or self.strategy == "beam_sampling" or self._samples_beams
        if self.do_sample is not None:
            return self.do_sample
        if active(self, "num_beams") or active(self, "penalty_alpha") or self.temperature == 0:
            return False
        return self.temperature is not None or any(active(self, name) for name in SAMPLING_ONLY)

    @property
    def _samples_beams(self) -> bool:
        return self.strategy == "beam_search" and self.do_sample is True

    @property
    def beams(self) -> int:
        """The number of beams; 1 unless decoding is by beam search."""
        if self.mode != "beam":
            return 1
        return DEFAULT_BEAMS if self.num_beams is None else self.num_beams

    @property
    def groups(self) -> int:
        return self.num_beam_groups or 1

    @property
    def constraint(self) -> str | None:
        """The field that constrains the text, if there is one."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """The end-of-text tokens that replace the model's own, None to keep those."""
        return None if self.eos_token_id is None else tuple(np.atleast_1d(self.eos_token_id).tolist())


def make_config(config: GenerationConfig | None = None, **overrides: Any) -> GenerationConfig:
    """`config`, or the default one, with some fields replaced. ConfigError for a value outside its meaning."""
    if config is None:
        return GenerationConfig(**overrides)
    if not isinstance(config, GenerationConfig):
        raise ConfigError(f"config is of type {type(config).__name__}; give a GenerationConfig")
    return config.with_overrides(**overrides) if overrides else config
