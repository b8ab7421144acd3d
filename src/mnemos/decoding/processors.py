"""Functions that change a row of logits before a token is chosen: penalties and bans.

A processor takes the sequence so far and a float32 row (vocabulary,), which it changes in place. Results match Hugging
Face's processors of the same name, and CHAIN has their order. Penalties touch only tokens that have occurred.
The classes are dataclasses without comparison methods, since generating those would delay the program's start by some
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, TokenRules
from mnemos.decoding.history import History
from mnemos.decoding.transformers_objects import plain_processor
from mnemos.errors import MnemosError, RequestError

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig

Processor = Callable[[History, Floats], None]
NO_RULES = TokenRules()
_REMOVED = np.float32(-np.inf)


class LogitBias:
    """Adds a fixed amount to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._amounts = np.fromiter(bias.values(), np.float32, len(bias))

    def __call__(self, history: History, logits: Floats) -> None:
        logits[self._ids] += self._amounts


class SequenceBias:
    """Adds an amount to the logit of a sequence's last token where the text ends with the tokens before it."""

    def __init__(self, bias: Mapping[tuple[int, ...], float]) -> None:
        self._bias = dict(bias)

    def __call__(self, history: History, logits: Floats) -> None:
        tokens = history.tokens
        for sequence, amount in self._bias.items():
            known = len(sequence) - 1
            if known < len(tokens) and tuple(tokens[len(tokens) - known :]) == sequence[:-1]:
                logits[sequence[-1]] += np.float32(amount)


@dataclass(eq=False)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens that have occurred, or among the `last` tokens.

    Keskar et al. 2019, arXiv:1909.05858.
    """

    penalty: float
    last: int | None = None

    def __call__(self, history: History, logits: Floats) -> None:
        _penalize(logits, history.seen(self.last), self.penalty)


class SourceReward:
    """Multiplies positive and divides negative logits of tokens in the source, such as a text to translate."""

    def __init__(self, source: Sequence[int], reward: float) -> None:
        self._ids = np.unique(np.asarray(source, np.int64))
        self._reward = reward

    def __call__(self, history: History, logits: Floats) -> None:
        _penalize(logits, self._ids, 1 / self._reward)


@dataclass(eq=False)
class CountPenalty:
    """Subtracts `presence` once, and `frequency` for each occurrence, from tokens of the generated text.

    With `last`, only the last that many tokens of prompt and text count.
    """

    presence: float
    frequency: float
    last: int | None = None

    def __call__(self, history: History, logits: Floats) -> None:
        ids, counts = history.counts(self.last)
        logits[ids] -= (self.presence + self.frequency * counts).astype(np.float32)


@dataclass(eq=False)
class NoRepeatNgram:
    """Bans every token that would repeat an n-gram of prompt and generated text."""

    size: int

    def __call__(self, history: History, logits: Floats) -> None:
        tokens, prefix = history.array(), self.size - 1
        starts = len(tokens) - prefix
        if starts <= 0:
            return
        same = np.ones(starts, bool)
        for offset in range(prefix):
            same &= tokens[offset : offset + starts] == tokens[starts + offset]
        logits[tokens[np.flatnonzero(same) + prefix]] = _REMOVED


class NoSourceNgram:
    """Bans every token that would repeat an n-gram of the source."""

    def __init__(self, source: Sequence[int], size: int) -> None:
        self._prefix = size - 1
        self._next: dict[tuple[int, ...], list[int]] = {}
        for end in range(self._prefix, len(source)):
            self._next.setdefault(tuple(source[end - self._prefix : end]), []).append(source[end])

    def __call__(self, history: History, logits: Floats) -> None:
        latest = tuple(history.tokens[len(history.tokens) - self._prefix :])
        logits[self._next.get(latest, [])] = _REMOVED


class BadWords:
    """Bans token sequences: the last token of each where the text ends with the tokens before it."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        distinct = {tuple(sequence) for sequence in sequences}
        self._single = np.array(sorted(s[0] for s in distinct if len(s) == 1), np.int64)
        self._by_previous: dict[int, list[tuple[int, ...]]] = {}
        for sequence in sorted(s for s in distinct if len(s) > 1):
            self._by_previous.setdefault(sequence[-2], []).append(sequence)

    def __call__(self, history: History, logits: Floats) -> None:
        logits[self._single] = _REMOVED
        tokens = history.tokens
        for sequence in self._by_previous.get(tokens[-1], ()) if tokens else ():
            if len(sequence) <= len(tokens) and tuple(tokens[1 - len(sequence) :]) == sequence[:-1]:
                logits[sequence[-1]] = _REMOVED


class MinLength:
    """Bans the tokens that end a text until it has `total` tokens, `new` of them generated."""

    def __init__(self, stop_ids: Iterable[int], total: int, new: int) -> None:
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        self._total, self._new = total, new

    def __call__(self, history: History, logits: Floats) -> None:
        if len(history.tokens) < self._total or history.generated < self._new:
            logits[self._stop_ids] = _REMOVED


@dataclass(eq=False)
class Padding:
    """Bans the ids from `start` on but those that are `named`: rows that only pad a model's vocabulary."""

    start: int
    named: Sequence[int]

    def __call__(self, history: History, logits: Floats) -> None:
        values = logits[self.named]
        logits[self.start :] = _REMOVED
        logits[self.named] = values


class Allowed:
    """Bans all other tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._ids = np.array(tokens, np.int64)

    def __call__(self, history: History, logits: Floats) -> None:
        kept = logits[self._ids]
        logits[:] = _REMOVED
        logits[self._ids] = kept


@dataclass(eq=False)
class AllowedByPrefix:
    """Bans all tokens but those that a user's function f(0, token_ids) returns; 0 is the only text's index."""

    function: Any

    def __call__(self, history: History, logits: Floats) -> None:
        tokens = _call(self.function, "prefix_allowed_tokens_fn", 0, history.array().copy())
        ids = np.unique(np.asarray(tokens, dtype=np.int64).reshape(-1))
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(logits):
            raise RequestError(
                f"prefix_allowed_tokens_fn allows the token ids {ids[0]} to {ids[-1]}; "
                f"the vocabulary has ids from 0 to {len(logits) - 1}"
            )
        Allowed(ids.tolist())(history, logits)


@dataclass(eq=False)
class DecayingLength:
    """After `start` generated tokens, raises the logits of tokens that end the text, more with each token."""

    stop_ids: tuple[int, ...]
    start: int
    factor: float

    def __call__(self, history: History, logits: Floats) -> None:
        beyond = history.generated - self.start
        if beyond > 0:
            ids = list(self.stop_ids)
            logits[ids] += np.abs(logits[ids]) * np.float32(self.factor**beyond - 1)


@dataclass(eq=False)
class ForcedTokens:
    """Allows only `tokens`, with a logit of 0, where the text has `length` tokens, prompt included."""

    tokens: tuple[int, ...]
    length: int

    def __call__(self, history: History, logits: Floats) -> None:
        if len(history.tokens) == self.length:
            logits[:] = _REMOVED
            logits[list(self.tokens)] = 0


@dataclass(eq=False)
class Suppressed:
    """Bans `tokens`: everywhere, or only as token number `generated` of the generated text."""

    tokens: tuple[int, ...]
    generated: int | None = None

    def __call__(self, history: History, logits: Floats) -> None:
        if self.generated is None or history.generated == self.generated:
            logits[list(self.tokens)] = _REMOVED


@dataclass(eq=False)
class Custom:
    """A user's function f(token_ids, logits); an error in it becomes the request's error."""

    function: Any

    def __call__(self, history: History, logits: Floats) -> None:
        result = _call(self.function, "logits processor", tuple(history.tokens), logits)
        if result is not None:
            logits[:] = _call(lambda: np.asarray(result, dtype=np.float32).reshape(logits.shape), "logits processor")


@dataclass(frozen=True)
class Setting:
    """The input from which processors are made.

    config     the request's
    stop_ids   the tokens that end the text
    bad_words  all banned token sequences
    rules      the forced and suppressed tokens
    prompt     the prompt's length in tokens
    longest    the text's greatest length in tokens, prompt included
    source     the encoder's input, or else the prompt
    breakers   the tokens that break a repetition
    """

    config: GenerationConfig
    stop_ids: frozenset[int] = frozenset()
    bad_words: Sequence[Sequence[int]] = ()
    rules: TokenRules = NO_RULES
    prompt: int = 0
    longest: int = 0
    source: Sequence[int] = ()
    breakers: Collection[int] = ()


def processors_of(setting: Setting) -> list[Processor]:
    """The processors that the config asks for, before temperature and cut-offs, in the order of CHAIN."""
    made = [processor for make in CHAIN if (processor := make(setting)) is not None]
    functions: Any = setting.config.logits_processors
    return [*made, *(Custom(plain_processor(function)) for function in functions)]


Maker = Callable[[Setting], "Processor | None"]


def _for(field: str, make: Callable[[Setting, Any], Processor]) -> Maker:
    """Makes a processor from a field's value if that has an effect."""
    return lambda setting: make(setting, getattr(setting.config, field)) if field in setting.config.active else None


def _count_penalty(setting: Setting) -> Processor | None:
    config = setting.config
    presence, frequency = config.presence_penalty, config.frequency_penalty
    return CountPenalty(presence, frequency, config.penalty_last_n) if presence or frequency else None


def _dry(setting: Setting, multiplier: float) -> Processor:
    from mnemos.decoding.dry import DryPenalty  # seldom used, and the start is faster without it

    config = setting.config
    return DryPenalty(multiplier, config.dry_base, config.dry_allowed_length, setting.breakers, config.penalty_last_n)


def _dola(setting: Setting, layers: object) -> Processor:
    from mnemos.decoding.dola import Dola  # seldom used, like DRY

    return Dola()


def _decay(setting: Setting, decay: tuple[int, float]) -> Processor:
    return DecayingLength(tuple(sorted(setting.stop_ids)), *decay)


def _bad_words(setting: Setting) -> Processor | None:
    ends = setting.stop_ids
    banned = [sequence for sequence in setting.bad_words if not (len(sequence) == 1 and sequence[0] in ends)]
    return BadWords(banned) if banned else None


def _min_length(setting: Setting) -> Processor | None:
    total, new = setting.config.min_length, setting.config.min_new_tokens
    return MinLength(setting.stop_ids, total, new) if (total or new) and setting.stop_ids else None


def _forced_first(setting: Setting) -> Processor | None:
    return ForcedTokens(setting.rules.forced_bos, 1) if setting.rules.forced_bos else None


def _forced_last(setting: Setting) -> Processor | None:
    return ForcedTokens(setting.rules.forced_eos, setting.longest - 1) if setting.rules.forced_eos else None


def _suppressed(setting: Setting) -> Processor | None:
    return Suppressed(setting.rules.suppressed) if setting.rules.suppressed else None


def _suppressed_first(setting: Setting) -> Processor | None:
    rules = setting.rules
    place = 1 if rules.forced_bos and setting.prompt == 1 else 0
    return Suppressed(rules.suppressed_first, place) if rules.suppressed_first else None


CHAIN: tuple[Maker, ...] = (
    _for("dola_layers", _dola),
    _for("logit_bias", lambda setting, bias: LogitBias(bias)),
    _for("sequence_bias", lambda setting, bias: SequenceBias(bias)),
    _for("encoder_repetition_penalty", lambda setting, reward: SourceReward(setting.source, reward)),
    _for("repetition_penalty", lambda setting, penalty: RepetitionPenalty(penalty, setting.config.penalty_last_n)),
    _count_penalty,
    _for("dry_multiplier", _dry),
    _for("no_repeat_ngram_size", lambda setting, size: NoRepeatNgram(size)),
    _for("encoder_no_repeat_ngram_size", lambda setting, size: NoSourceNgram(setting.source, size)),
    _bad_words,
    _min_length,
    _for("allowed_token_ids", lambda setting, tokens: Allowed(tokens)),
    _for("prefix_allowed_tokens_fn", lambda setting, function: AllowedByPrefix(function)),
    _forced_first,
    _forced_last,
    _for("exponential_decay_length_penalty", _decay),
    _suppressed,
    _suppressed_first,
)


def _penalize(logits: Floats, ids: npt.NDArray[np.int64], penalty: float) -> None:
    values, factor = logits[ids], np.float32(penalty)
    logits[ids] = np.where(values < 0, values * factor, values / factor)


def _call(function: Any, role: str, *arguments: Any) -> Any:
    """The result of a user's function; an error in it becomes the request's error."""
    try:
        return function(*arguments)
    except MnemosError:
        raise
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise RequestError(f"{role} {name} failed: {type(error).__name__}: {error}") from error
