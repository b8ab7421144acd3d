"""From a request's config to its strategy, with the checks that need the prompt and the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.contract import ModelSpec, TokenRules
from mnemos.decoding.choice import Chooser, Constraint, Cutoffs
from mnemos.decoding.config import DEFAULT_CANDIDATES, GenerationConfig
from mnemos.decoding.fields import SAMPLING_ONLY
from mnemos.decoding.lengths import check_ids, new_tokens
from mnemos.decoding.processors import Padding, Processor, Setting, processors_of
from mnemos.decoding.sampling import Drafter, Sampling
from mnemos.decoding.seeds import fresh_seed
from mnemos.decoding.stopping import StopRules, StopWatch, TextEnds
from mnemos.decoding.strategy import Strategy
from mnemos.decoding.tokenizer_like import TokenizerLike
from mnemos.decoding.transformers_objects import plain_criterion
from mnemos.errors import ContextLengthError, RequestError

if TYPE_CHECKING:  # a process that only samples starts faster without the others
    from mnemos.decoding.beam import BeamSearch
    from mnemos.decoding.contrastive import ContrastiveSearch

_OPENERS = "\n\t([{<\"'`*_-/\u201c\u2018\u00ab"  # a word may follow these without a space
_SAMPLERS_OWN = ("temperature", "top_k", "top_p", "min_p")  # `choice.sample` applies these itself


def make_strategy(
    config: GenerationConfig,
    prompt_ids: Sequence[int],
    tokenizer: TokenizerLike | None,
    spec: ModelSpec,
    source: Sequence[int] | None = None,
) -> Strategy:
    """The strategy that runs one request. `prompt_ids` are as `fit_prompt` returned them; `source` is the encoder's
    input, if the model has an encoder.

    Without a tokenizer, stop strings, bad words and constraints are refused. Raises RequestError or ContextLengthError
    for a request that this model cannot run.
    """
    return _Builder(config, prompt_ids, tokenizer, spec, prompt_ids if source is None else source).build()


class _Builder:
    def __init__(
        self,
        config: GenerationConfig,
        prompt_ids: Sequence[int],
        tokenizer: TokenizerLike | None,
        spec: ModelSpec,
        source: Sequence[int],
    ) -> None:
        self.config = config
        self.prompt_ids = prompt_ids
        self.tokenizer = tokenizer
        self.spec = spec
        self.source = source
        self.most = new_tokens(config, len(prompt_ids), spec)
        self.negative = self._negative_prompt() if "guidance_scale" in config.active else []
        self.stop_ids = self._stop_ids()
        self.token_rules = self._token_rules()
        self.padding = self._padding()
        self._check()

    def build(self) -> Strategy:
        count = self.config.prompt_logprobs
        if count is None:
            return self._continuation()
        from mnemos.decoding.prompt_scores import PromptOnly, ScoredPrompt

        return ScoredPrompt(self._continuation() if self.most else PromptOnly(self.config.num_return_sequences), count)

    def _continuation(self) -> Strategy:
        """What follows the prompt."""
        if not self.negative:
            return self._unguided()
        from mnemos.decoding.guidance import Guided

        return Guided(self._unguided(), self.negative, self.config.guidance_scale or 0.0)

    def _unguided(self) -> Strategy:
        match self.config.mode:
            case "beam":
                return self._beam_search()
            case "contrastive":
                return self._contrastive_search()
            case _:
                return self._sampling()

    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(
            self._chooser(),
            self.watch,
            seed=self._seed(),
            most=self.most,
            results=config.num_return_sequences,
            samples=config.best_of or config.num_return_sequences,
            logprobs=config.logprobs,
            constraint=self._constraint(),
            drafter=self._drafter(),
            early_layers=self._early_layers(),
        )

    def _early_layers(self) -> tuple[int, ...]:
        wanted: Any = self.config.dola_layers
        if wanted is None:
            return ()
        from mnemos.decoding.dola import early_layers

        return early_layers(wanted, self.spec)

    def _negative_prompt(self) -> list[int]:
        """The negative prompt's tokens, by default the prompt's last one; fits `most` to it."""
        given, length = self.config.negative_prompt, self.spec.context_length
        if isinstance(given, str):
            tokens = self._needed_tokenizer("negative_prompt").encode(given)
        else:
            tokens = [*(self.prompt_ids[-1:] if given is None else given)]
        check_ids("negative_prompt", tokens, self.spec)
        room = length - len(tokens)
        if room < (self.most if self.config.max_new_tokens is not None else 1):
            raise ContextLengthError(
                f"negative_prompt has {len(tokens)} tokens, too many for the text that follows it in the context of "
                f"{length}; shorten it, or lower max_new_tokens"
            )
        self.most = min(self.most, room)
        return tokens

    def _constraint(self) -> Constraint | None:
        field = self.config.constraint
        if field is None:
            return None
        from mnemos.decoding.grammar import constraint_of

        tokenizer = self._needed_tokenizer(field)
        eos = self.config.eos_ids or self.spec.eos_token_ids
        return constraint_of(self.config, tokenizer, eos)

    def _drafter(self) -> Callable[[], Drafter] | None:
        config = self.config
        if config.speculative is None:
            return None
        from mnemos.decoding.speculative import DEFAULT_DRAFT_TOKENS, DraftModel, PromptLookup

        kind = PromptLookup if config.speculative == "prompt_lookup" else DraftModel
        return partial(kind, config.draft_tokens or DEFAULT_DRAFT_TOKENS)

    def _beam_search(self) -> BeamSearch:
        from mnemos.decoding.beam import BeamSearch, BeamSettings

        config = self.config
        settings = BeamSettings(
            beams=config.beams,
            results=config.num_return_sequences,
            most=self.most,
            groups=config.groups,
            diversity_penalty=config.diversity_penalty or 0.0,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            seed=self._seed() if config.samples else None,
            logprobs=config.logprobs,
            pad_id=self._pad_id(),
            stop_tokens=len(self.stop_ids),
        )
        filters: Sequence[Processor] = ()
        if config.samples:
            from mnemos.decoding.cutoffs import filters_of

            filters = filters_of(config, keep=len(self.stop_ids) + 1)
        rules = self._rules()
        ends = TextEnds(rules, self._pieces if rules.strings else None)
        return BeamSearch(settings, self._processors_for_search(), ends, filters, self._constraint())

    def _contrastive_search(self) -> ContrastiveSearch:
        from mnemos.decoding.contrastive import ContrastiveSearch

        config = self.config
        processors = self._processors_for_search()
        alpha, top_k = config.penalty_alpha or 0.0, config.top_k or DEFAULT_CANDIDATES
        return ContrastiveSearch(top_k, alpha, processors, self.watch, config.logprobs, self._constraint())

    def _seed(self) -> int:
        return fresh_seed() if self.config.seed is None else self.config.seed

    def _pad_id(self) -> int:
        for token in (self.config.pad_token_id, self.spec.pad_token_id, *sorted(self.stop_ids)):
            if token is not None:
                return token
        return 0

    def _chooser(self) -> Chooser:
        config = self.config
        processors, known = self._processors(), None
        if self.padding is not None and self.padding.named:
            processors.append(self.padding)
        elif self.padding is not None:
            known = self.padding.start
        if not config.samples:
            return Chooser(processors, known=known)
        if any(field in config.active for field in SAMPLING_ONLY if field not in _SAMPLERS_OWN):
            from mnemos.decoding.cutoffs import filters_of

            return Chooser(processors, filters_of(config), Cutoffs(), known)
        temperature = 1.0 if config.temperature is None else config.temperature
        top_p = 1.0 if config.top_p is None else config.top_p
        return Chooser(processors, (), Cutoffs(temperature, config.top_k or 0, top_p, config.min_p or 0.0), known)

    def _padding(self) -> Padding | None:
        """Bans rows that only pad the model's vocabulary; None if there are none.

        The ids that the model or the request names, to be chosen or to end a text, are no padding.
        """
        size = 0 if self.tokenizer is None else self.tokenizer.vocabulary_size
        if not 1 < size < self.spec.vocabulary_size:  # 1: the tokenizer does not say
            return None
        rules, allowed = self.token_rules, np.atleast_1d(self.config.allowed_token_ids or ()).astype(int).tolist()
        named = {*self.stop_ids, *rules.forced_bos, *rules.forced_eos, *allowed}
        return Padding(size, [token for token in named if token >= size])

    def _processors_for_search(self) -> list[Processor]:
        """`_processors`, and the bans that a `Chooser` knows how to do without one."""
        padding = [] if self.padding is None else [self.padding]
        return [*self._processors(), *padding]

    def _processors(self) -> list[Processor]:
        length = len(self.prompt_ids)
        return processors_of(
            Setting(
                self.config,
                self.stop_ids,
                self._bad_words(),
                self.token_rules,
                prompt=length,
                longest=length + self.most,
                source=self.source,
                breakers=self._breakers() if "dry_multiplier" in self.config.active else (),
            )
        )

    def _token_rules(self) -> TokenRules:
        """The model's own rules, overridden by the config's."""
        config, own = self.config, self.spec.token_rules
        said = {
            "forced_bos": config.forced_bos_token_id,
            "forced_eos": config.forced_eos_token_id,
            "suppressed": config.suppress_tokens,
            "suppressed_first": config.begin_suppress_tokens,
        }
        changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        return replace(own, **changes) if changes else own

    def _rules(self) -> StopRules:
        config = self.config
        least = max(config.min_new_tokens, config.min_length - len(self.prompt_ids), 0)
        given: Any = config.stopping_criteria
        criteria = tuple(map(plain_criterion, given))
        deadline = None if config.max_time is None else time.monotonic() + config.max_time
        return StopRules(
            self.stop_ids,
            least,
            self.most,
            tuple(config.stop),
            criteria,
            config.stop_when_repeating,
            deadline,
            config.include_stop_str_in_output,
        )

    def watch(self) -> StopWatch:
        """Called when the strategy starts, from which max_time counts."""
        rules = self._rules()
        if not rules.strings:
            return StopWatch(rules, None)
        decoder = self._needed_tokenizer("stop").decoder(self.config.skip_special_tokens, continues=True)
        return StopWatch(rules, decoder, self._name_of_special)

    def _name_of_special(self, token: int) -> str:
        """A special token's name if it is not shown, though it may be in a stop string; "" for any other token."""
        tokenizer = self._needed_tokenizer("stop")
        if token not in tokenizer.special_ids or not self.config.skip_special_tokens:
            return ""
        return tokenizer.decode([token], skip_special=False, continues=True)

    def _pieces(self, tokens: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of generated tokens, piece by piece, and whether it is shown."""
        tokenizer = self._needed_tokenizer("stop")
        pieces: list[tuple[str, bool]] = []
        for special, run in groupby(tokens, tokenizer.special_ids.__contains__):
            shown = not (special and self.config.skip_special_tokens)
            pieces.append((tokenizer.decode(list(run), skip_special=False, continues=True), shown))
        return pieces

    def _stop_ids(self) -> frozenset[int]:
        eos = self.config.eos_ids
        ending = () if self.config.ignore_eos else self.spec.eos_token_ids if eos is None else eos
        return frozenset(ending) | frozenset(np.atleast_1d(self.config.stop_token_ids).astype(int).tolist())

    def _bad_words(self) -> list[list[int]]:
        """The banned token sequences: each word at the start of a text, after a space and after an opener."""
        words = [list(sequence) for sequence in self.config.bad_words_ids or self.token_rules.bad_words]
        for word in self.config.bad_words:
            tokenizer, spaced = self._needed_tokenizer("bad_words"), " " + word.lstrip()
            words.append(tokenizer.encode(word, add_special=False))
            own = tokenizer.encode(word, continues=True)
            words += [own, tokenizer.encode(spaced, continues=True)]
            for opener in _OPENERS:
                with suppress(RequestError):  # the tokenizer cannot write it
                    opened = tokenizer.encode(opener + word, continues=True)
                    if opened[-len(own) :] != own:  # a token spans both
                        words.append(opened)
        return [word for number, word in enumerate(words) if word and word not in words[:number]]

    def _breakers(self) -> list[int]:
        """The last token of each text that breaks a repetition; none without a tokenizer, unless texts were given."""
        texts = self.config.dry_sequence_breakers
        if self.tokenizer is None and "dry_sequence_breakers" not in self.config.active:
            return []
        tokenizer, found = self._needed_tokenizer("dry_sequence_breakers"), []
        for text in texts:
            with suppress(RequestError):  # a vocabulary that cannot spell it has no such token
                found += tokenizer.encode("a" + text, add_special=False, continues=True)[-1:]
        return found

    def _needed_tokenizer(self, field: str) -> TokenizerLike:
        if self.tokenizer is None:
            raise RequestError(f"{field} needs a tokenizer, and this engine has none; give token ids instead")
        return self.tokenizer

    def _check(self) -> None:
        config, spec = self.config, self.spec
        ids: dict[str, Iterable[int]] = {
            "logit_bias": config.logit_bias or (),
            "stop_token_ids": np.atleast_1d(config.stop_token_ids).astype(int).tolist(),
            "eos_token_id": config.eos_ids or (),
            "forced_bos_token_id": self.token_rules.forced_bos,
            "forced_eos_token_id": self.token_rules.forced_eos,
            "suppress_tokens": self.token_rules.suppressed,
            "begin_suppress_tokens": self.token_rules.suppressed_first,
            "sequence_bias": [token for sequence in config.sequence_bias or () for token in sequence],
            "allowed_token_ids": np.atleast_1d(config.allowed_token_ids or ()).astype(int).tolist(),
            "bad_words_ids": [token for sequence in config.bad_words_ids for token in sequence],
        }
        for name, tokens in ids.items():
            check_ids(name, tokens, spec)
        if config.stop:
            self._needed_tokenizer("stop")
        if config.min_new_tokens > self.most or config.min_length > len(self.prompt_ids) + self.most:
            raise RequestError(
                f"min_new_tokens is {config.min_new_tokens} and min_length {config.min_length}, but the lengths and "
                f"the context allow {self.most} new tokens after {len(self.prompt_ids)}"
            )
