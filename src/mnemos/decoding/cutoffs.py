"""Temperature and cut-offs: processors that leave out improbable tokens before one is drawn.

They set the logits that they remove to minus infinity and keep at least `keep` tokens. Results match Hugging Face's
processors of the same name, and CUTOFFS has their order; methods that it lacks are where their authors put them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats
from mnemos.decoding.history import History, Surprises
from mnemos.decoding.processors import Processor
from mnemos.decoding.ranking import covering, descending, nucleus
from mnemos.decoding.seeds import uniform

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig

_REMOVED = np.float32(-np.inf)
_BIT = log(2)  # in nats
_XTC_DRAW = 1  # which of a position's random numbers; number 0 chooses the token


@dataclass(eq=False)
class Temperature:
    """Divides logits by the temperature."""

    temperature: float

    def __call__(self, history: History, logits: Floats) -> None:
        logits /= np.float32(self.temperature)


@dataclass(eq=False)
class TopK:
    """Keeps the k largest logits, and those equal to the smallest of them. Fan et al. 2018, arXiv:1805.04833."""

    top_k: int
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        logits[logits < _nth_largest(logits, max(self.top_k, self.keep))] = _REMOVED


@dataclass(eq=False)
class TopP:
    """Keeps the fewest most probable tokens with a total of top_p. Holtzman et al. 2019, arXiv:1904.09751."""

    top_p: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        weights = np.exp(logits - logits.max())
        kept, _ = nucleus(weights, self.top_p, self.keep)
        values = logits[kept]
        logits[:] = _REMOVED
        logits[kept] = values


@dataclass(eq=False)
class MinP:
    """Keeps tokens at least min_p times as probable as the most probable. Nguyen et al. 2024, arXiv:2407.01082."""

    min_p: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        probabilities = _softmax(logits)
        _remove(logits, probabilities < np.float32(self.min_p) * probabilities.max(), self.keep)


@dataclass(eq=False)
class TopNSigma:
    """Keeps logits within n standard deviations of the largest. Tang et al. 2024, arXiv:2411.07641."""

    n: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        possible = logits[logits > _REMOVED]
        _remove(logits, logits < possible.max() - np.float32(self.n) * possible.std(), self.keep)


@dataclass(eq=False)
class ExcludeTopChoices:
    """At random, removes all tokens with a probability of at least `threshold` except the least probable: XTC.

    The random number depends on the text's seed and the position. From text-generation-webui, pull request 6335.
    """

    probability: float
    threshold: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        if uniform(history.seed, len(history.tokens), _XTC_DRAW) >= self.probability:
            return
        probabilities = _softmax(logits)
        top = np.flatnonzero(probabilities >= np.float32(self.threshold))
        if len(top) > 1 and np.count_nonzero(logits > _REMOVED) - len(top) + 1 >= self.keep:
            logits[top[descending(probabilities[top])[:-1]]] = _REMOVED


@dataclass(eq=False)
class Typical:
    """Keeps tokens whose information is nearest to the entropy, up to `mass`. Meister et al. 2022, arXiv:2202.00666."""

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


@dataclass(eq=False)
class Epsilon:
    """Removes tokens less probable than epsilon. Hewitt et al. 2022, arXiv:2210.15191."""

    epsilon: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        _remove(logits, _softmax(logits) < np.float32(self.epsilon), self.keep)


@dataclass(eq=False)
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


@dataclass(eq=False)
class Mirostat:
    """Removes tokens above a bound on surprise that adapts so that the text stays near `tau` bits; mirostat 2.

    Basu et al. 2020, arXiv:2007.14966. The bound starts at 2 tau; after each token it falls by eta times the amount by
    which the token's surprise, among the tokens that were left, exceeded tau.
    """

    tau: float
    eta: float
    keep: int = 1

    def __call__(self, history: History, logits: Floats) -> None:
        bound, known = 2 * self.tau, history.surprises
        if known is not None:
            bound = known.bound
            for token in history.tokens[known.place :]:
                bound -= self.eta * (float(known.bits[token]) - self.tau)
        _remove(logits, _log_softmax(logits) < np.float32(-bound * _BIT), self.keep)
        history.surprises = Surprises(bound, len(history.tokens), -_log_softmax(logits) / np.float32(_BIT))


# The field that turns a cut-off on, and the function that makes its processor from the config and `keep`.
CUTOFFS: tuple[tuple[str, Callable[[Any, int], Processor]], ...] = (
    ("temperature", lambda config, keep: Temperature(config.temperature)),
    ("top_n_sigma", lambda config, keep: TopNSigma(config.top_n_sigma, keep)),
    ("top_k", lambda config, keep: TopK(config.top_k, keep)),
    ("top_p", lambda config, keep: TopP(config.top_p, keep)),
    ("min_p", lambda config, keep: MinP(config.min_p, keep)),
    ("typical_p", lambda config, keep: Typical(config.typical_p, keep)),
    ("epsilon_cutoff", lambda config, keep: Epsilon(config.epsilon_cutoff, keep)),
    ("eta_cutoff", lambda config, keep: Eta(config.eta_cutoff, keep)),
    ("xtc_probability", lambda config, keep: ExcludeTopChoices(config.xtc_probability, config.xtc_threshold, keep)),
    ("mirostat", lambda config, keep: Mirostat(config.mirostat_tau, config.mirostat_eta, keep)),
)


def filters_of(config: GenerationConfig, keep: int = 1) -> list[Processor]:
    """The temperature and the cut-offs that have an effect; `keep` is the fewest tokens that a cut-off leaves."""
    return [make(config, keep) for field, make in CUTOFFS if field in config.active]


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum(), dtype=np.float32)


def _nth_largest(logits: Floats, n: int) -> float:
    place = max(len(logits) - n, 0)
    return float(np.partition(logits, place)[place])


def _remove(logits: Floats, removed: npt.NDArray[np.bool_], keep: int) -> None:
    logits[removed & (logits < _nth_largest(logits, keep))] = _REMOVED
