"""What a smaller model has lost: its probabilities compared with another model's, token by token, on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from mnemos.contract import Floats, ModelSpec
from mnemos.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.text.tokenizer import Tokenizer

CHUNK = 512  # tokens of a piece of text that is evaluated on its own, or the model's context if that is shorter
LARGEST_EXPONENT = 700.0  # a float can still represent its exponential
_ROWS = 32  # rows of probabilities that are held in float64
_SPEED_PROMPT, _SPEED_TOKENS, _SPEED_RUNS = 128, 24, 3
Progress = Callable[[int, int], None]  # (tokens done, tokens)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model against another on a text, token by token; natural logarithms, float64.

    nll, against_nll (scored,): negative log likelihoods of each chunk's tokens but its first.
    divergences (tokens,): the Kullback-Leibler divergence of the other's next-token probabilities from the model's.
    agreements (tokens,): where both find the same token most probable.
    """

    nll: npt.NDArray[np.float64]
    against_nll: npt.NDArray[np.float64]
    divergences: npt.NDArray[np.float64]
    agreements: npt.NDArray[np.bool_]

    @property
    def perplexity(self) -> float:
        """The model's."""
        return perplexity(float(self.nll.mean()))

    @property
    def against_perplexity(self) -> float:
        """The other's."""
        return perplexity(float(self.against_nll.mean()))

    @property
    def divergence(self) -> float:
        """The mean divergence, in nats per token."""
        return float(self.divergences.mean())

    def percentile(self, percent: float) -> float:
        """The divergence that this percentage of the tokens does not exceed."""
        return float(np.percentile(self.divergences, percent))

    @property
    def agreement(self) -> float:
        """The share of tokens, 0 to 1, for which both find the same next token most probable."""
        return float(self.agreements.mean())


class Predictor(Protocol):
    """What `compare` needs of an engine."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def logits(self, token_ids: Sequence[int], /) -> Floats: ...


class Remembered:
    """An engine that computes the logits of each text once, to compare several models with it.

    Holds 4 * tokens * vocabulary bytes for all texts that it was asked for.
    """

    def __init__(self, engine: InferenceEngine) -> None:
        self.spec, self.tokenizer = engine.spec, engine.tokenizer
        self._engine = engine
        self._known: dict[tuple[int, ...], Floats] = {}

    def logits(self, token_ids: Sequence[int], /) -> Floats:
        """The engine's, float32 (tokens, vocabulary)."""
        key = tuple(token_ids)
        if key not in self._known:
            self._known[key] = self._engine.logits(token_ids)
        return self._known[key]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of reading a prompt and of writing."""

    prompt: float
    generation: float


def perplexity(mean: float) -> float:
    """exp of a mean negative log likelihood, infinite where a float cannot hold it."""
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def cut(token_ids: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive chunks of at most `size` tokens, without those of a single token, which cannot be scored."""
    chunks = [list(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    return [chunk for chunk in chunks if len(chunk) > 1]


def compare(
    model: Predictor, against: Predictor, chunks: Sequence[list[int]], progress: Progress | None = None
) -> Comparison:
    """`model` against `against` on chunks of token ids, each evaluated on its own.

    Holds both models' logits of one chunk, 8 * tokens * vocabulary bytes; the rest is bounded.
    Errors: ConfigError for different vocabularies or no chunks, ModelError for logits that are not finite.
    """
    _check_vocabularies(model, against)
    if not chunks:
        raise ConfigError("the text has no two tokens in a row; at least 2 are needed")
    parts: list[tuple[npt.NDArray[np.float64], ...]] = []
    agreements = []
    done, total = 0, sum(map(len, chunks))
    for chunk in chunks:
        own, other = model.logits(chunk), against.logits(chunk)
        for what, logits in (("model", own), ("model compared with", other)):
            if not np.isfinite(logits).all():
                raise ModelError(f"the {what} gives logits that are not finite; expected finite weights")
        agreements.append(own.argmax(axis=1) == other.argmax(axis=1))
        parts.extend(_compare_rows(own, other, chunk))
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    nll, against_nll, divergences = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Comparison(nll, against_nll, divergences, np.concatenate(agreements))


def _compare_rows(own: Floats, other: Floats, chunk: list[int]) -> Iterator[tuple[npt.NDArray[np.float64], ...]]:
    following = np.asarray(chunk[1:])
    for start in range(0, len(chunk), _ROWS):
        p, q = (_log_softmax(logits[start : start + _ROWS]) for logits in (other, own))
        scored = following[start : start + _ROWS]
        index = np.arange(len(scored))
        divergence = np.einsum("tv,tv->t", np.exp(p), p - q)
        yield -q[index, scored], -p[index, scored], np.maximum(divergence, 0.0)  # below 0 by rounding only


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _check_vocabularies(model: Predictor, against: Predictor) -> None:
    sizes = [engine.spec.vocabulary_size for engine in (model, against)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens; expected the same vocabulary"
        )
    if model.tokenizer is not None and against.tokenizer is not None:
        check_same_tokens(model.tokenizer, against.tokenizer, sizes[0])


def check_same_tokens(one: Tokenizer, other: Tokenizer, count: int) -> None:
    """ConfigError if the tokenizers have different texts for any of about 256 of `count` tokens.

    Another tokenizer differs almost everywhere.
    """
    for token in range(0, count, max(count // 256, 1)):
        texts = one.decode([token]), other.decode([token])
        if texts[0] != texts[1]:
            raise ConfigError(
                f"token {token} is {texts[0]!r} in one model and {texts[1]!r} in the other; expected the same "
                "vocabulary"
            )


def measure_speed(engine: InferenceEngine, token_ids: Sequence[int]) -> Speed:
    """The engine's best of a few short runs: a prompt from `token_ids`, and tokens after it."""
    context = engine.spec.context_length
    prompt = list(token_ids[: min(_SPEED_PROMPT, max(context // 2, 1))])
    tokens = min(_SPEED_TOKENS, context - len(prompt))
    firsts, rests = [], []
    for run in range(_SPEED_RUNS):
        own = [*prompt[run:], *prompt[:run]]  # a new first token, so that nothing is found in the prefix cache
        timings = engine.complete(own, max_new_tokens=tokens, ignore_eos=True, do_sample=False).timings
        firsts.append(timings.time_to_first_token)
        rests.append(timings.total - timings.time_to_first_token)
    generation = (tokens - 1) / min(rests) if tokens > 1 else math.nan
    return Speed(len(prompt) / min(firsts), generation)
