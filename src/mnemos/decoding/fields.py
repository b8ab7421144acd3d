"""Every field of `GenerationConfig`: one row each, from which checks, command line and documents are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from mnemos.decoding.kinds import (
    BIAS,
    DECAY,
    DOLA_LAYERS,
    EARLY_STOPPING,
    JSON_SCHEMA,
    MEMORY,
    MIROSTAT,
    PROMPT,
    SEQUENCE,
    SEQUENCE_BIAS,
    TEMPERATURE,
    TOKEN,
    function,
)
from mnemos.errors import ConfigError
from mnemos.rules import FLAG, LARGEST_INT, Rule, filled, hint, one_of, real, several, text, whole

# The strategies that a config may name, and the decoding mode of each.
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

# The groups of fields in the order in which help and documents show them, with their titles.
GROUPS = {
    "length": "length",
    "sampling": "sampling (without any of these, the most probable token is chosen)",
    "repetition": "repetition",
    "tokens": "tokens that must or must not appear",
    "stopping": "stopping",
    "text": "text",
    "search": "search",
    "constraints": "constraints",
    "results": "results",
    "speed": "speed (affects only the time)",
    "scheduling": "scheduling",
}


class Field(NamedTuple):
    """One field.

    rule       the values that are allowed
    help       what it does, in one line
    default    None where leaving it out has no single value
    neutral    values that change nothing, and so contradict nothing: clients send them out of habit
    habitual   other libraries' defaults: beside a `strategy` that does not sample, such a value came along with the
               rest of a config and is ignored; elsewhere it is meant
    only       the decoding in which it has an effect, a key of ONLY; "" for every one
    means      (value, field's value) pairs: the meanings of other libraries' special values; None is the default
    alias      a second name that GenerationConfig accepts
    elsewhere  its names in other libraries; an unknown field of such a name gets this one as its hint
    metavar    the name of its value in help texts, where that is not obvious from the rule
    """

    name: str
    group: str
    rule: Rule
    help: str
    default: Any = None
    neutral: tuple[Any, ...] = ()
    habitual: tuple[Any, ...] = ()
    only: str = ""
    means: tuple[tuple[Any, Any], ...] = ()
    alias: str = ""
    elsewhere: tuple[str, ...] = ()
    metavar: str = ""

    def normal(self, value: Any) -> Any:
        """The value in its normal form, None being the default. Raises ConfigError if it is not allowed."""
        if value is None or value is self.default:
            return self.default
        for given, meant in self.means:
            if type(value) is type(given) and value == given:
                return self.default if meant is None else meant
        return self.rule.apply(self.name, value)


# Why a field with `only` is refused in another decoding.
ONLY = {
    "sampling": "it only has an effect when sampling: set do_sample=True, or leave it out",
    "beam": "only beam search uses it: set num_beams",
    "contrastive": "only contrastive search uses it",
    "one text": "only greedy decoding and sampling use it",
}

_TOKENS = several(TOKEN, 4096)
_MANY_TOKENS = several(TOKEN, 1 << 20)
_SEQUENCES = several(SEQUENCE, 16384, single=False)
_LONG_TEXT = text(1 << 20)

FIELDS: tuple[Field, ...] = (
    Field(
        "max_new_tokens", "length",
        replace(whole(0), meaning="a whole number of at least 1, or 0 with prompt_logprobs to score the prompt alone"),
        "Maximum number of tokens to generate; 256 if neither this nor max_length is given.",
        alias="max_tokens", elsewhere=("max_completion_tokens", "num_predict", "n_predict", "max_gen_len"),
    ),
    Field(
        "max_length", "length", whole(1),
        "Maximum number of tokens of prompt and generated text; the limit reached first ends the text.",
    ),
    Field(
        "min_new_tokens", "length", whole(0),
        "Minimum number of tokens to generate: until then, stop tokens are banned and stop strings ignored.",
        default=0, alias="min_tokens",
    ),
    Field(
        "min_length", "length", whole(0),
        "Minimum number of tokens of prompt and generated text.", default=0,
    ),
    Field(
        "exponential_decay_length_penalty", "length", DECAY,
        "A pair of N and a factor: after N tokens, each further one makes the end of the text more probable by it.",
        metavar="N,FACTOR",
    ),
    Field(
        "max_time", "length", real(0, 1e9, open_low=True),
        "Stop after this many seconds, counted from the first step.", metavar="S",
    ),
    Field(
        "overflow", "length", one_of("error", "truncate_left", "sliding"),
        "For a prompt that is too long: error, truncate_left (cut its beginning), or sliding (an endless text).",
        default="error", elsewhere=("truncation", "truncate", "truncate_prompt_tokens"), metavar="HOW",
    ),
    Field(
        "strategy", "sampling", one_of(*STRATEGIES),
        f"Choose the strategy explicitly: {', '.join(STRATEGIES)}.", metavar="NAME",
    ),
    Field(
        "do_sample", "sampling", FLAG,
        "Draw tokens at random; False chooses the most probable one whatever else is given.",
    ),
    Field(
        "temperature", "sampling", TEMPERATURE,
        "Below 1 is more predictable, above 1 more random; 0 is greedy.",
        neutral=(0.0, 1.0), only="sampling", elsewhere=("temp",), metavar="T",
    ),
    Field(
        "top_k", "sampling", whole(0),
        "Choose among the N most probable tokens; in contrastive search, the number of candidates.",
        neutral=(0,), habitual=(50,), only="sampling", means=((-1, None),),
    ),
    Field(
        "top_p", "sampling", real(0, 1),
        "Choose among the smallest set of most probable tokens whose probabilities sum to P, at least one.",
        neutral=(1.0,), habitual=(0.9,), only="sampling", elsewhere=("nucleus_p",), metavar="P",
    ),
    Field(
        "min_p", "sampling", real(0, 1),
        "Leave out tokens less than P times as probable as the most probable one.",
        neutral=(0.0,), only="sampling", metavar="P",
    ),
    Field(
        "typical_p", "sampling", real(0, 1, open_low=True),
        "Locally typical sampling: keep tokens of near-average information, up to probability P in total.",
        neutral=(1.0,), only="sampling", elsewhere=("typical",), metavar="P",
    ),
    Field(
        "epsilon_cutoff", "sampling", real(0, 1, open_high=True),
        "Leave out tokens below this probability.", neutral=(0.0,), only="sampling", metavar="P",
    ),
    Field(
        "eta_cutoff", "sampling", real(0, 1, open_high=True),
        "Eta sampling: leave out tokens below a probability that falls as the distribution gets flatter.",
        neutral=(0.0,), only="sampling", metavar="P",
    ),
    Field(
        "top_n_sigma", "sampling", real(0, 100),
        "Leave out tokens whose logit is more than N standard deviations of all logits below the largest.",
        neutral=(0.0,), only="sampling", means=((-1, None), (-1.0, None)),
    ),
    Field(
        "xtc_probability", "sampling", real(0, 1),
        "Exclude top choices: with this probability, keep only the least probable of the tokens above xtc_threshold.",
        neutral=(0.0,), only="sampling", metavar="P",
    ),
    Field(
        "xtc_threshold", "sampling", real(0, 0.5),
        "The probability from which a token is a top choice.", default=0.1, metavar="P",
    ),
    Field(
        "mirostat", "sampling", MIROSTAT,
        "The value 2 turns on mirostat 2, which adapts the cut-off to keep the text's surprise near mirostat_tau.",
        neutral=(0,), only="sampling",
    ),
    Field(
        "mirostat_tau", "sampling", real(0, 100),
        "The surprise per token that mirostat aims for, in bits.", default=5.0,
    ),
    Field(
        "mirostat_eta", "sampling", real(0, 1),
        "Mirostat's learning rate.", default=0.1,
    ),
    Field(
        "seed", "sampling", whole(0, 2**64 - 1),
        "The same seed gives the same text, whatever else runs; random by default. Each result has its own stream.",
        means=((-1, None),), elsewhere=("random_seed",),
    ),
    Field(
        "repetition_penalty", "repetition", real(0.01, 100),
        "Above 1 makes tokens that occur in the prompt or the text less probable.",
        default=1.0, elsewhere=("repeat_penalty",),
    ),
    Field(
        "encoder_repetition_penalty", "repetition", real(0.01, 100),
        "Above 1 makes tokens of the source (the encoder's input, or else the prompt) more probable.", default=1.0,
    ),
    Field(
        "presence_penalty", "repetition", real(-2, 2),
        "Subtracted once from the logit of each token that has been generated.", default=0.0,
    ),
    Field(
        "frequency_penalty", "repetition", real(-2, 2),
        "Subtracted from a token's logit for each time it has been generated.", default=0.0,
    ),
    Field(
        "penalty_last_n", "repetition", whole(1),
        "Repetition, presence and frequency penalties consider the last N tokens only; by default all.",
        means=((-1, None),), elsewhere=("repeat_last_n",),
    ),
    Field(
        "dry_multiplier", "repetition", real(0, 100),
        "Don't repeat yourself: the strength of a penalty on tokens that would lengthen a repetition.",
        default=0.0, neutral=(0.0,),
    ),
    Field(
        "dry_base", "repetition", real(1, 100),
        "The factor by which that penalty grows per token of a repetition beyond dry_allowed_length.", default=1.75,
    ),
    Field(
        "dry_allowed_length", "repetition", whole(1),
        "The shortest repetition that is penalized, in tokens.", default=2,
    ),
    Field(
        "dry_sequence_breakers", "repetition", several(text(64), 256),
        "Texts that break a repetition.", default=("\n", ":", '"', "*"), metavar="TEXT",
    ),
    Field(
        "no_repeat_ngram_size", "repetition", whole(0),
        "No N consecutive tokens occur twice in prompt and text.", default=0,
    ),
    Field(
        "encoder_no_repeat_ngram_size", "repetition", whole(0),
        "No N consecutive tokens are copied from the source.", default=0,
    ),
    Field(
        "stop_when_repeating", "repetition", FLAG,
        "End a text that repeats the same block over and over.", default=False,
    ),
    Field(
        "bad_words", "tokens", several(text(1024), 16384),
        "Texts that must not be generated.", default=(), metavar="TEXT",
    ),
    Field(
        "bad_words_ids", "tokens", _SEQUENCES,
        "Token sequences that must not be generated; by default the model's own.", default=(), metavar="ID,...",
    ),
    Field(
        "logit_bias", "tokens", BIAS,
        "Amounts from -100 to 100 added to the logits of tokens.", neutral=({},), metavar="ID=X",
    ),
    Field(
        "sequence_bias", "tokens", SEQUENCE_BIAS,
        "Amounts added to the logit of a sequence's last token when the text ends with the tokens before it.",
        neutral=({},), metavar="ID,...=X",
    ),
    Field(
        "allowed_token_ids", "tokens", filled(_MANY_TOKENS),
        "Only these tokens may appear.", metavar="ID,...",
    ),
    Field(
        "prefix_allowed_tokens_fn", "tokens", function("(number of the text, token_ids) -> token ids"),
        "A function f(0, token_ids) of all ids so far, an int64 array, which returns the tokens that may come next.",
    ),
    Field(
        "logits_processors", "tokens", several(function("(token_ids, logits)"), 64),
        "Functions f(token_ids, logits) of all ids so far and a float32 row (vocabulary,), which they change in place "
        "or replace by returning another; also transformers' own.",
        default=(), elsewhere=("logits_processor",),
    ),
    Field(
        "suppress_tokens", "tokens", _MANY_TOKENS,
        "Tokens that never appear; by default the model's own, none with an empty list.", metavar="ID,...",
    ),
    Field(
        "begin_suppress_tokens", "tokens", _MANY_TOKENS,
        "Tokens that may not come first; by default the model's own, none with an empty list.", metavar="ID,...",
    ),
    Field(
        "forced_bos_token_id", "tokens", several(TOKEN, 1),
        "The token that follows the decoder's start token, such as the language to translate into; by default "
        "the model's own.",
        metavar="ID",
    ),
    Field(
        "forced_eos_token_id", "tokens", _TOKENS,
        "The last token of a text that reaches its maximum length; by default the model's own.", metavar="ID,...",
    ),
    Field(
        "stop", "stopping", several(text(4096), 256),
        "End the text before this string.",
        default=(), elsewhere=("stop_strings", "stop_sequences", "stop_words"), metavar="TEXT",
    ),
    Field(
        "stop_token_ids", "stopping", _TOKENS,
        "Tokens that end the text and are left out of it.", default=(), metavar="ID,...",
    ),
    Field(
        "eos_token_id", "stopping", _TOKENS,
        "The end-of-text tokens, instead of the model's own.", metavar="ID,...",
    ),
    Field("ignore_eos", "stopping", FLAG, "Continue after the model's end-of-text token.", default=False),
    Field(
        "stopping_criteria", "stopping", several(function("(token_ids) -> bool"), 64),
        "Functions f(token_ids) of all ids so far; the text ends when one returns True; also transformers' own.",
        default=(),
    ),
    Field(
        "pad_token_id", "stopping", TOKEN,
        "The token that pads shorter rows of a batch's array; by default the model's own.", metavar="ID",
    ),
    Field(
        "bos_token_id", "stopping", TOKEN,
        "The token that stands for a prompt without tokens; other texts begin as the tokenizer's file specifies.",
        metavar="ID",
    ),
    Field(
        "include_stop_str_in_output", "text", FLAG,
        "The text includes the stop string, or the stop token's text, that ended it.", default=False,
    ),
    Field(
        "skip_special_tokens", "text", FLAG,
        "Leave the names of special tokens out of the text; token ids always include them.", default=True,
    ),
    Field(
        "num_beams", "search", whole(1, 256),
        "Use beam search with N beams.", neutral=(1,), elsewhere=("beam_width", "beam_size"),
    ),
    Field(
        "num_beam_groups", "search", whole(1, 256),
        "Diverse beam search: beams in N groups that avoid each other's tokens.", neutral=(1,), only="beam",
    ),
    Field(
        "diversity_penalty", "search", real(0, 1e6),
        "Subtracted from a token's score per beam of an earlier group that chose it.", neutral=(0.0,), only="beam",
    ),
    Field(
        "length_penalty", "search", real(-100, 100),
        "Above 0 favours longer results of beam search.", default=1.0, neutral=(1.0,), only="beam",
    ),
    Field(
        "early_stopping", "search", EARLY_STOPPING,
        "Beam search ends when enough texts are finished (true), when better ones are unlikely (false) or impossible "
        "(never).",
        default=False, neutral=(False,), only="beam", metavar="WHEN",
    ),
    Field(
        "penalty_alpha", "search", real(0, 1),
        "Use contrastive search, with this weight of the penalty on tokens that resemble the text so far.",
        neutral=(0.0,), only="contrastive", metavar="A",
    ),
    Field(
        "guidance_scale", "search", real(0, 100),
        "Classifier-free guidance: above 1 leads the text away from what would follow negative_prompt, by this much.",
        neutral=(1.0,), metavar="X",
    ),
    Field(
        "negative_prompt", "search", PROMPT,
        "The prompt that guidance leads away from; by default the prompt's last token.",
        elsewhere=("negative_prompt_ids",), metavar="TEXT",
    ),
    Field(
        "dola_layers", "search", DOLA_LAYERS,
        "Prefer tokens that become more probable in the layers after an early one, the one of these that differs most: "
        "low or high (of the lower or upper half), or layer numbers.",
        only="one text", metavar="LAYERS",
    ),
    Field(
        "json_schema", "constraints", JSON_SCHEMA,
        "The text is JSON that fits this schema; true allows any JSON.",
        elsewhere=("response_format", "guided_json", "format"), metavar="JSON",
    ),
    Field(
        "strict", "constraints", FLAG,
        "Refuse a json_schema that cannot be enforced whole; by default a warning names what is not.", default=False,
    ),
    Field(
        "regex", "constraints", _LONG_TEXT,
        "The text matches this regular expression.",
        elsewhere=("guided_regex",), metavar="REGEX",
    ),
    Field(
        "choice", "constraints", filled(several(text(65536), 16384, single=False)),
        "The text is one of these.", elsewhere=("guided_choice",), metavar="TEXT",
    ),
    Field(
        "grammar", "constraints", _LONG_TEXT,
        "The text follows this Lark grammar.", elsewhere=("guided_grammar",), metavar="TEXT",
    ),
    Field(
        "num_return_sequences", "results", whole(1, 1024),
        "The number of results, each with its own random numbers.", default=1, alias="n",
    ),
    Field(
        "best_of", "results", whole(1, 1024),
        "Sample N texts and return the num_return_sequences of them with the highest mean log probability.",
        neutral=(1,),
    ),
    Field(
        "logprobs", "results", whole(0, 100),
        "Report each token's log probability in the model's own distribution, and those of the N most probable "
        "tokens.",
        means=((True, 0), (False, None)), elsewhere=("top_logprobs",),
    ),
    Field(
        "prompt_logprobs", "results", whole(0, 100),
        "Report the same for each token of the prompt but the first. The prompt is then evaluated whole, whatever the "
        "prefix cache holds of it.",
        means=((True, 0), (False, None)),
    ),
    Field(
        "speculative", "speed", one_of("prompt_lookup", "draft"),
        "Guess several tokens and verify them in one step: prompt_lookup from the text itself, draft by a draft model.",
        only="one text", metavar="HOW",
    ),
    Field(
        "draft_tokens", "speed", whole(1, 64),
        "Maximum number of tokens to guess at once; 10 by default.",
        elsewhere=("num_assistant_tokens", "num_speculative_tokens", "prompt_lookup_num_tokens"),
    ),
    Field(
        "priority", "scheduling", whole(-LARGEST_INT),
        "Waiting requests with a lower number start first.", default=0,
    ),
    Field(
        "tenant", "scheduling", text(1024),
        "The request's tenant: tenants take turns.", default="default", elsewhere=("user",), metavar="NAME",
    ),
    Field(
        "deadline", "scheduling", real(0, 1e9, open_low=True),
        "The longest time to wait in the queue, in seconds; after that, the request fails.",
        elsewhere=("timeout",), metavar="S",
    ),
    Field(
        "cache_salt", "scheduling", text(1024),
        "Cached prefixes are shared only between requests with the same salt.", metavar="TEXT",
    ),
    Field(
        "adapter", "scheduling", text(1024),
        "The name of a LoRA adapter that the engine was given beside its model.", metavar="NAME",
    ),
    Field(
        "memory", "scheduling", MEMORY,
        "What rows of a long text see, in place of the engine's memory: sinks, a window and pages that they recall.",
        metavar="POLICY",
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {field.name: field.rule for field in FIELDS}
ALIASES = {field.alias: field.name for field in FIELDS if field.alias}
INACTIVE = {field.name: (None, field.default, *field.neutral) for field in FIELDS}
HABITUAL = {field.name: field.habitual for field in FIELDS if field.habitual}
CONSTRAINTS = tuple(field.name for field in FIELDS if field.group == "constraints" and field.rule is not FLAG)
SAMPLING_ONLY = tuple(field.name for field in FIELDS if field.only == "sampling")

# Options of other libraries without an equivalent field, and what to do instead.
_INSTEAD = {
    "use_cache": "keys and values are always cached; leave it out",
    "return_dict_in_generate": "complete() returns an object with all details; leave it out",
    "output_scores": "logprobs gives log probabilities, logits() the logits; leave it out",
    "output_logits": "logprobs gives log probabilities, logits() the logits; leave it out",
    "renormalize_logits": "log probabilities are always those of the model's own distribution; leave it out",
    "echo": "results hold the generated text only; prompt_logprobs scores the prompt",
    "stream": "call stream() instead",
    "watermarking_config": "watermarks are not supported",
}


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises ConfigError, with a hint, for the first name that is not a field."""
    for name in names:
        if name not in RULES and name not in ALIASES:
            raise ConfigError(f"{name} is not a field of GenerationConfig; {advice(str(name))}")


def advice(name: str) -> str:
    """What to do instead of giving a field of this name, which there is not."""
    if name in _INSTEAD:
        return _INSTEAD[name]
    for field in FIELDS:
        if name in field.elsewhere:
            return f"it is called {field.name} here"
    return hint(name, [*RULES, *ALIASES], "the fields")
