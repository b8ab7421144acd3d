"""Functions that change a row of logits before a token is chosen: penalties, bans and cut-offs.

A processor takes the sequence so far and a float32 row (vocabulary,), which it changes in place. Results are those of
Hugging Face's processors of the same name; `processors_of` and `filters_of` put them in its order. Penalties touch only
the tokens that were seen. Cut-offs set what they remove to minus infinity and keep at least `keep` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, TokenRules
from mnemos.decoding.history import History
from mnemos.decoding.ranking import covering, descending
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


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens seen before. Keskar et al. 2019, arXiv:1909.05858."""

    penalty: float

    def __call__(self, history: History, logits: Floats) -> None:
        _penalize(logits, history.seen(), self.penalty)


class SourceReward:
    """Multiplies positive and divides negative logits of the tokens of the source, what is to be translated, say."""

    def __init__(self, source: Sequence[int], reward: float) -> None:
        self._ids = np.unique(np.asarray(source, np.int64))
        self._reward = reward

    def __call__(self, history: History, logits: Floats) -> None:
        _penalize(logits, self._ids, 1 / self._reward)


@dataclass(frozen=True)
class CountPenalty:
    """Subtracts `presence` once and `frequency` for each occurrence of a token in the generated text."""

    presence: float
    frequency: float

    def __call__(self, history: History, logits: Floats) -> None:
        ids, counts = history.counts()
        logits[ids] -= (self.presence + self.frequency * counts).astype(np.float32)


@dataclass(frozen=True)
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
    """Bans token sequences: the last token of each, where the text ends with those before it."""

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


@dataclass(frozen=True)
class Forced:
    """Leaves only `tokens`, with a logit of 0, where the text has `length` tokens, the prompt's included."""

    tokens: tuple[int, ...]
    length: int

    def __call__(self, history: History, logits: Floats) -> None:
        if len(history.tokens) == self.length:
            logits[:] = _REMOVED
            logits[list(self.tokens)] = 0


@dataclass(frozen=True)
class Suppressed:
    """Bans `tokens`: everywhere, or only as the token number `generated` of the generated text."""

    tokens: tuple[int, ...]
    generated: int | None = None

    def __call__(self, history: History, logits: Floats) -> None:
        if self.generated is None or history.generated == self.generated:
            logits[list(self.tokens)] = _REMOVED


@dataclass(frozen=True)
class Custom:
    """A user's function f(token_ids, logits); an error in it is the request's error."""

    function: Any

    def __call__(self, history: History, logits: Floats) -> None:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        try:
            result = self.function(tuple(history.tokens), logits)
            if result is not None:
                logits[:] = np.asarray(result, dtype=np.float32).reshape(logits.shape)
        except MnemosError:
            raise
        except Exception as error:
            raise RequestError(f"logits processor {name} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Temperature:
    temperature: float

    def __call__(self, history: History, logits: Floats) -> None:
        logits /= np.float32(self.temperature)


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits, and those equal to the smallest of them. Fan et al. 2018, arXiv:1805.04833."""

    top_k: int
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        logits[logits < _nth_largest(logits, max(self.top_k, self.keep))] = _REMOVED


@dataclass(frozen=True)
class TopP:
    """Keeps the fewest most probable tokens that together reach top_p. Holtzman et al. 2019, arXiv:1904.09751."""

    top_p: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        possible = np.flatnonzero(logits > _REMOVED)
        # Ascending; of equally probable tokens the lower id comes later.
        order = possible[descending(logits[possible])[::-1]]
        below = _cumulative(logits[order]) <= np.float32(1 - self.top_p)
        below[-self.keep :] = False
        logits[order[below]] = _REMOVED


@dataclass(frozen=True)
class MinP:
    """Keeps tokens at least min_p times as probable as the most probable. Nguyen et al. 2024, arXiv:2407.01082."""

    min_p: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        probabilities = _softmax(logits)
        _remove(logits, probabilities < np.float32(self.min_p) * probabilities.max(), self.keep)


@dataclass(frozen=True)
class Typical:
    """Keeps tokens whose information is nearest the entropy, up to `mass`. Meister et al. 2022, arXiv:2202.00666."""

    mass: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        possible = np.flatnonzero(logits > _REMOVED)
        log_probabilities = _log_softmax(logits[possible])
        probabilities = np.exp(log_probabilities)
        distance = np.abs(log_probabilities - np.sum(log_probabilities * probabilities))
        order, cumulative = covering(-distance, probabilities, self.mass, 1024)
        last = int(np.sum(cumulative.astype(np.float32) < np.float32(self.mass)))
        removed = distance > distance[order[min(last, len(order) - 1)]]
        removed[order[: self.keep]] = False
        logits[possible[removed]] = _REMOVED


@dataclass(frozen=True)
class Epsilon:
    """Removes tokens less probable than epsilon. Hewitt et al. 2022, arXiv:2210.15191."""

    epsilon: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        _remove(logits, _softmax(logits) < np.float32(self.epsilon), self.keep)


@dataclass(frozen=True)
class Eta:
    """Removes tokens less probable than min(epsilon, sqrt(epsilon) * exp(-entropy)). Hewitt et al. 2022."""

    epsilon: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        log_probabilities = _log_softmax(logits)
        probabilities = np.exp(log_probabilities)
        entropy = -np.sum(np.where(probabilities > 0, log_probabilities, 0) * probabilities)
        eta = min(self.epsilon, float(np.sqrt(self.epsilon) * np.exp(-entropy)))
        _remove(logits, probabilities < np.float32(eta), self.keep)


def processors_of(
    config: GenerationConfig,
    stop_ids: Iterable[int],
    bad_words: Iterable[Sequence[int]],
    rules: TokenRules = NO_RULES,
    prompt: int = 0,
    longest: int = 0,
    source: Sequence[int] = (),
) -> list[Processor]:
    """What the config asks for before temperature and cut-offs, in Hugging Face's order.

    `stop_ids` are the tokens that end the text; `bad_words` all banned token sequences; `rules` the forced and
    suppressed tokens; `prompt` and `longest` the prompt's and the text's greatest length in tokens; `source` what an
    encoder reads, or else the prompt.
    """
    stop_ids = set(stop_ids)
    banned = [sequence for sequence in bad_words if not (len(sequence) == 1 and sequence[0] in stop_ids)]
    chain: list[Processor] = []
    if config.logit_bias:
        chain.append(LogitBias(config.logit_bias))
    if config.encoder_repetition_penalty != 1:
        chain.append(SourceReward(source, config.encoder_repetition_penalty))
    if config.repetition_penalty != 1:
        chain.append(RepetitionPenalty(config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        chain.append(CountPenalty(config.presence_penalty, config.frequency_penalty))
    if config.no_repeat_ngram_size:
        chain.append(NoRepeatNgram(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size:
        chain.append(NoSourceNgram(source, config.encoder_no_repeat_ngram_size))
    if banned:
        chain.append(BadWords(banned))
    if (config.min_length or config.min_new_tokens) and stop_ids:
        chain.append(MinLength(stop_ids, config.min_length, config.min_new_tokens))
    if rules.forced_bos:
        chain.append(Forced(rules.forced_bos, 1))
    if rules.forced_eos:
        chain.append(Forced(rules.forced_eos, longest - 1))
    if rules.suppressed:
        chain.append(Suppressed(rules.suppressed))
    if rules.suppressed_first:
        chain.append(Suppressed(rules.suppressed_first, 1 if rules.forced_bos and prompt == 1 else 0))
    functions: Any = config.logits_processors
    return [*chain, *(Custom(function) for function in functions)]


def filters_of(config: GenerationConfig, keep: int = 1) -> list[Processor]:
    """Temperature and cut-offs, in Hugging Face's order; `keep` is the fewest tokens that a cut-off leaves."""
    chain: list[Processor] = []
    if config.temperature not in (None, 1):
        chain.append(Temperature(config.temperature))
    if config.top_k:
        chain.append(TopK(config.top_k, keep))
    if config.top_p is not None and config.top_p < 1:
        chain.append(TopP(config.top_p, keep))
    if config.min_p:
        chain.append(MinP(config.min_p, keep))
    if config.typical_p is not None and config.typical_p < 1:
        chain.append(Typical(config.typical_p, keep))
    if config.epsilon_cutoff:
        chain.append(Epsilon(config.epsilon_cutoff, keep))
    if config.eta_cutoff:
        chain.append(Eta(config.eta_cutoff, keep))
    return chain


def _penalize(logits: Floats, ids: npt.NDArray[np.int64], penalty: float) -> None:
    values, factor = logits[ids], np.float32(penalty)
    logits[ids] = np.where(values < 0, values * factor, values / factor)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=np.float32)


def _cumulative(logits: Floats) -> Floats:
    return np.cumsum(_softmax(logits), dtype=np.float64).astype(np.float32)


def _nth_largest(logits: Floats, n: int) -> float:
    place = max(len(logits) - n, 0)
    return float(np.partition(logits, place)[place])


def _remove(logits: Floats, removed: npt.NDArray[np.bool_], keep: int) -> None:
    logits[removed & (logits < _nth_largest(logits, keep))] = _REMOVED
