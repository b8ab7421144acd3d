"""Decisions are the model's own probabilities, in whatever company they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.decoding.options import ForcedOptions
from mnemos.engine.decide import Choice, Predicate, Score, option_ids, prompt_of
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import RequestError

TEXT = "I was charged twice for my order and want one of the charges refunded today."
LABELS = ["refund", "delivery", "technical problem", "praise for the team", *(f"topic number {n}" for n in range(30))]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(str(smollm2), context_length=2048) as engine:
        yield engine


def by_hand(engine: InferenceEngine, question: Any) -> list[float]:
    """Each option's log probability from the logits of the whole text."""
    assert engine.tokenizer is not None
    prompt, sums = prompt_of(engine.tokenizer, TEXT, question), []
    for option in option_ids(engine.tokenizer, question):
        logits = engine.logits([*prompt, *option])[len(prompt) - 1 : -1].astype(np.float64)
        logprobs = (
            logits
            - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            - logits.max(1, keepdims=True)
        )
        sums.append(float(logprobs[np.arange(len(option)), option].sum()))
    return sums


@pytest.mark.parametrize(
    "question",
    [
        Predicate("Is the customer asking for a refund?"),
        Choice("What is this about?", LABELS[:12]),
        Score("How angry is the customer?", ["calm", "annoyed", "angry"]),
    ],
)
@pytest.mark.slow
def test_probabilities_are_those_of_whole_labels(engine: InferenceEngine, question: Any) -> None:
    decision = engine.decide(TEXT, question)
    expected = np.array(by_hand(engine, question))
    assert np.allclose(list(decision.logprobs.values()), expected, atol=1e-4)
    weights = np.exp(expected - expected.max())
    assert np.allclose(list(decision.probabilities.values()), weights / weights.sum(), atol=1e-5)
    assert sum(decision.probabilities.values()) == pytest.approx(1)


def test_questions_share_their_input_and_do_not_change_each_other(engine: InferenceEngine) -> None:
    questions = {
        "refund": Predicate("Is the customer asking for a refund?"),
        "topic": Choice("What is this about?", {"money": "payments and refunds", "delivery": None}),
        "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "annoyed", "angry"]},
    }
    text = TEXT * 10
    together = engine.decide(text, questions)
    assert isinstance(together["refund"].answer, bool) and together["topic"].answer in ("money", "delivery")
    assert 0 <= together["anger"].answer <= 2
    for name, question in questions.items():
        alone = engine.decide(text, question)
        assert alone.probabilities == together[name].probabilities
        assert alone.cached_tokens > 100


@pytest.mark.parametrize("rewinds", [True, False])
def test_options_are_evaluated_in_lanes_or_each_in_a_branch(rewinds: bool) -> None:
    strategy = ForcedOptions([[1], *([2, n, 3] for n in range(40))], rewinds)
    assert strategy.max_branches == (16 if rewinds else 40)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Choice("x", ["a"]), "2 to 255"),
        (Choice("x", ["a", "a"]), "twice"),
        (Choice("x", ["a", ""]), "not empty"),
        (Score("x", list("abcdefghijk")), "2 to 10"),
        (Predicate(" "), "what is asked"),
        ({"type": "box", "instructions": "x"}, "predicate, choice or score"),
        ({"type": "choice", "instructions": "x"}, "criteria"),
        ("yes?", "must be a Predicate"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(engine: InferenceEngine, question: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.decide(TEXT, question)


def test_likelihoods_are_those_of_the_whole_text(engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode("The capital of France is")
    texts = (" Paris", " a city", " London, the city of the king")
    options = [engine.tokenizer.encode(text, continues=True) for text in texts]
    greedy = engine.complete(prompt, max_new_tokens=4, do_sample=False).choices[0].token_ids
    found = engine.submit_likelihoods(prompt, [*options, greedy]).result()
    for option, one in zip(options, found, strict=False):
        score = engine.score([[*prompt, *option]])[0]
        assert one.logprob == pytest.approx(float(score.logprobs[-len(option) :].sum()), abs=1e-4)
    assert found[-1].greedy and not found[2].greedy
    with pytest.raises(RequestError, match="options has one without tokens"):
        engine.submit_likelihoods(prompt, [[1], []])
