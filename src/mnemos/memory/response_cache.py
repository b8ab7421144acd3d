"""Answers that were generated before, for requests that would generate them again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.errors import ConfigError
from mnemos.memory.paraphrase import may_share_an_answer, overlap
from mnemos.rules import COUNT, real

if TYPE_CHECKING:
    from mnemos.decoding.prompt_scores import ScoredToken

Key = tuple[Any, ...]
Deliveries = Sequence[tuple[list[Emitted], list[FinishedSequence]]]
FINISHED = ("stop", "length", "repetition")  # ends that another run would have too
_SCHEDULING = ("priority", "deadline")  # fields that change when an answer comes, not what it is
_SIMILAR = real(0, 1, open_low=True)


@dataclass(frozen=True)
class Cached:
    """Why an answer was not generated.

    exact    an earlier request was the same in everything that decides the answer
    similar  it differed in its question, which was `prompt`, by `similarity`
    """

    kind: Literal["exact", "similar"]
    similarity: float = 1.0
    prompt: str | None = None


@dataclass(frozen=True)
class Question:
    """The last thing that was asked, and everything before it that an answer depends on."""

    text: str
    context: str = ""


@dataclass(frozen=True)
class KeptAnswer:
    """What a request delivered, and the scores of its prompt."""

    deliveries: Deliveries
    prompt_scores: list[ScoredToken] = field(default_factory=list)


class ResponseCache:
    """The answers of an engine's latest requests, as `response_cache` of the engine. Safe to use from many threads.

    A request that is the same as an earlier one (its tokens, model, settings, tenant and cache_salt) gets the same
    answer, token by token, if it would generate that anyway: greedy decoding, beams, or sampling with a seed, without
    functions of the caller's. Its result says so (`Completion.cached`).

    size     most answers; the least recently used go first
    similar  None: never anything but the same request. A number up to 1: a greedy request whose last message, or whose
             text, is at least that similar to an earlier one may get its answer, if all else is the same and the two
             agree in numbers, names, negations and the order of words. That is a guess, and sometimes wrong: see
             docs/memory.md for how often.
    encoder  a function from a text to a vector, of which the cosine is the similarity; by default it is the share of
             words in common
    """

    def __init__(
        self, size: int = 1000, *, similar: float | None = None, encoder: Callable[[str], Any] | None = None
    ) -> None:
        self.size: int = COUNT.apply("size", size)
        self.similar: float | None = None if similar is None else _SIMILAR.apply("similar", similar)
        if encoder is not None and similar is None:
            raise ConfigError("encoder is given and similar is None; give similar, the least similarity that counts")
        self.encoder = encoder
        self.exact_hits = 0
        self.similar_hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._answers: OrderedDict[Key, KeptAnswer] = OrderedDict()
        self._questions: dict[Key, dict[Key, str]] = {}  # by all but the question, then by the whole key
        self._places: dict[Key, Key] = {}
        self._vectors: dict[str, npt.NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def answers_to(self, prompt: Sequence[int]) -> int:
        """How many answers there are to a prompt's tokens, with whatever settings, and for whatever tenant."""
        with self._lock:
            return sum(key[-1] == tuple(prompt) for key in self._answers)

    def clear(self) -> None:
        """Forgets all answers."""
        with self._lock:
            self._answers.clear()
            self._questions.clear()
            self._places.clear()
            self._vectors.clear()

    def find(
        self, model: str, prompt: Sequence[int], config: GenerationConfig, question: Question | None = None
    ) -> tuple[KeptAnswer, Cached] | None:
        """The answer that a request may have, if there is one. None for one that must be generated."""
        settings = settings_of(config)
        if settings is None:
            return None
        key: Key = (model, settings, tuple(prompt))
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None:
                self._answers.move_to_end(key)
                self.exact_hits += 1
                return answer, Cached("exact")
            if self.similar is not None and question is not None and not config.samples:
                found = self._nearest((model, settings, question.context), question.text)
                if found is not None:
                    self.similar_hits += 1
                    return found
            self.misses += 1
        return None

    def keep(
        self,
        model: str,
        prompt: Sequence[int],
        config: GenerationConfig,
        answer: KeptAnswer,
        question: Question | None = None,
    ) -> None:
        """Keeps a request's answer, if it is complete and another run would have it too."""
        settings = settings_of(config)
        ends = [end for _, finished in answer.deliveries for end in finished]
        if settings is None or len(ends) < config.num_return_sequences:
            return
        if any(end.finish_reason not in FINISHED for end in ends):
            return
        key: Key = (model, settings, tuple(prompt))
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            if self.similar is not None and question is not None and not config.samples:
                place: Key = (model, settings, question.context)
                self._questions.setdefault(place, {})[key] = question.text
                self._places[key] = place
            while len(self._answers) > self.size:
                self._forget(next(iter(self._answers)))

    def _nearest(self, place: Key, text: str) -> tuple[KeptAnswer, Cached] | None:
        assert self.similar is not None
        best: tuple[float, Key] | None = None
        for key, other in self._questions.get(place, {}).items():
            if may_share_an_answer(text, other):
                similarity = self._similarity(text, other)
                if similarity >= self.similar and (best is None or similarity > best[0]):
                    best = (similarity, key)
        if best is None:
            return None
        similarity, key = best
        self._answers.move_to_end(key)
        return self._answers[key], Cached("similar", similarity, self._questions[place][key])

    def _similarity(self, one: str, other: str) -> float:
        if self.encoder is None:
            return overlap(one, other)
        return float(self._vector(one) @ self._vector(other))

    def _vector(self, text: str) -> npt.NDArray[np.float64]:
        assert self.encoder is not None
        if text not in self._vectors:
            if len(self._vectors) > 2 * self.size:
                self._vectors.clear()
            vector = np.asarray(self.encoder(text), dtype=np.float64).reshape(-1)
            self._vectors[text] = vector / max(float(np.linalg.norm(vector)), 1e-30)
        return self._vectors[text]

    def _forget(self, key: Key) -> None:
        del self._answers[key]
        place = self._places.pop(key, None)
        if place is not None:
            questions = self._questions[place]
            del questions[key]
            if not questions:
                del self._questions[place]


def settings_of(config: GenerationConfig) -> tuple[tuple[str, str], ...] | None:
    """Everything in a config that decides an answer; None if two requests of this config may differ."""
    if config.samples and config.seed is None:
        return None
    found = []
    for one in fields(config):
        value = getattr(config, one.name)
        if value != one.default and one.name not in _SCHEDULING:
            text = repr(value)
            if " at 0x" in text:  # a function or another object, which may do anything
                return None
            found.append((one.name, text))
    return tuple(found)
