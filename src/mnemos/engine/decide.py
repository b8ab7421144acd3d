"""Typed decisions: questions about an input, answered with probabilities and without generating text.

Each question is put to the model after the input, and the answer is the distribution over its options: an option's
probability is proportional to the product of its tokens' probabilities, whole labels, not their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.errors import RequestError, shown

if TYPE_CHECKING:
    import numpy.typing as npt

    from mnemos.decoding.options import ForcedOptions
    from mnemos.engine.completion import Usage
    from mnemos.text.tokenizer import Tokenizer

MOST_OPTIONS = 255
MOST_LEVELS = 10


@dataclass(frozen=True)
class Predicate:
    """A statement or a yes-or-no question. `yes` and `no`: what counts as such, where it needs saying."""

    text: str
    yes: str | None = None
    no: str | None = None

    @property
    def options(self) -> list[tuple[str, str | None]]:
        return [("Yes", self.yes), ("No", self.no)]


@dataclass(frozen=True)
class Choice:
    """One of 2 to 255 labels. A mapping gives each label a description, or None."""

    text: str
    labels: Sequence[str] | Mapping[str, str | None]

    @property
    def options(self) -> list[tuple[str, str | None]]:
        if isinstance(self.labels, Mapping):
            return list(self.labels.items())
        return [(label, None) for label in self.labels]


@dataclass(frozen=True)
class Score:
    """A level on a scale: the descriptions of 2 to 10 levels, from the lowest to the highest."""

    text: str
    levels: Sequence[str]

    @property
    def options(self) -> list[tuple[str, str | None]]:
        return [(str(number), level) for number, level in enumerate(self.levels)]


Question = Predicate | Choice | Score


@dataclass(frozen=True)
class Decision:
    """An answer.

    probabilities  of each option, summing to 1: "Yes" and "No", the labels, or the levels' numbers from "0"
    logprobs       natural log probability of each option as the model's continuation, not normalized
    prompt_tokens, cached_tokens  of the input and the question; how many were found in the prefix cache
    """

    question: Question
    probabilities: dict[str, float]
    logprobs: dict[str, float]
    prompt_tokens: int
    cached_tokens: int

    @property
    def answer(self) -> bool | str | float:
        """Whether the predicate holds, the most probable label, or the expected level, from 0."""
        if isinstance(self.question, Predicate):
            return self.probabilities["Yes"] >= 0.5
        if isinstance(self.question, Choice):
            return max(self.probabilities, key=lambda label: self.probabilities[label])
        return sum(int(level) * probability for level, probability in self.probabilities.items())

    @property
    def confidence(self) -> float:
        """The largest probability."""
        return max(self.probabilities.values())


def decision(question: Question, strategy: ForcedOptions, usage: Usage) -> Decision:
    """The answer to a question whose options `strategy` has evaluated."""
    labels = [label for label, _ in question.options]
    return Decision(
        question,
        dict(zip(labels, _normalized(strategy.logprobs).tolist(), strict=True)),
        dict(zip(labels, strategy.logprobs.tolist(), strict=True)),
        usage.prompt_tokens,
        usage.cached_tokens,
    )


def _normalized(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.exp(logprobs - logprobs.max())
    weights /= weights.sum()
    return weights


def question_of(given: Any, where: str) -> Question:
    """A question, from one or from a mapping with type, instructions and criteria. RequestError for anything else."""
    if isinstance(given, Mapping):
        given = _from_mapping(given, where)
    if not isinstance(given, Question):
        raise RequestError(f"{where} is {shown(given)}; it must be a Predicate, a Choice or a Score")
    options = [label for label, _ in given.options]
    if not isinstance(given.text, str) or not given.text.strip():
        raise RequestError(f"{where}.text is {shown(given.text)}; it must say what is asked")
    most = MOST_LEVELS if isinstance(given, Score) else MOST_OPTIONS
    if not 2 <= len(options) <= most:
        raise RequestError(f"{where} has {len(options)} options; it must have 2 to {most}")
    for label in options:
        if not isinstance(label, str) or not label:
            raise RequestError(f"{where} has the label {shown(label)}; labels are texts that are not empty")
    if len(set(options)) < len(options):
        raise RequestError(f"{where} has a label twice; labels must differ")
    return given


def _from_mapping(given: Mapping[str, Any], where: str) -> Question:
    kind, text, criteria = given.get("type"), given.get("instructions", ""), given.get("criteria")
    match kind:
        case "predicate" | "noul":
            found = criteria if isinstance(criteria, Mapping) else {}
            return Predicate(text, found.get("true"), found.get("false"))
        case "choice" if isinstance(criteria, (Mapping, list, tuple)):
            return Choice(text, criteria)
        case "score" if isinstance(criteria, (list, tuple)):
            return Score(text, criteria)
        case "choice" | "score":
            raise RequestError(f"{where}.criteria is {shown(criteria)}; it must list the options")
    raise RequestError(f"{where}.type is {shown(kind)}; it must be predicate, choice or score")


def prompt_of(tokenizer: Tokenizer, messages: str | Sequence[Mapping[str, Any]], question: Question) -> list[int]:
    """The token ids of an input with a question after it, up to where the answer begins."""
    asked = _asked(question)
    if tokenizer.chat_template is None:
        text = messages if isinstance(messages, str) else "\n\n".join(str(one.get("content", "")) for one in messages)
        return tokenizer.encode(f"{text}\n\n{asked}\nAnswer:", parse_special=False)
    if isinstance(messages, str):
        return tokenizer.encode_chat([{"role": "user", "content": f"{messages}\n\n{asked}"}])
    return tokenizer.encode_chat([*messages, {"role": "user", "content": asked}])


def option_ids(tokenizer: Tokenizer, question: Question) -> list[list[int]]:
    """The token ids of each option, as they continue the prompt."""
    lead = " " if tokenizer.chat_template is None else ""
    return [tokenizer.encode(lead + label, parse_special=False, continues=True) for label, _ in question.options]


def _asked(question: Question) -> str:
    lines = [question.text.strip()]
    lines += [f"- {label}: {described}" for label, described in question.options if described]
    labels = [label for label, _ in question.options]
    lines.append(f"Answer with one of these words only: {', '.join(labels)}")
    return "\n".join(lines)
