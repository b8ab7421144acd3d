"""Typed decisions over HTTP are the engine's."""

from __future__ import annotations

from typing import Any

import httpx
import ollama
import openai
import pytest

from mnemos.engine.decide import Choice, Predicate
from mnemos.engine.engine import InferenceEngine

TEXT = "I was charged twice for my order and want one of the charges refunded today. " * 4


def test_openais_client_gets_answers_in_order(client: httpx.Client, engine: InferenceEngine) -> None:
    sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)
    questions: Any = [
        {"type": "predicate", "name": "refund", "instructions": "Is the customer asking for a refund?"},
        {
            "type": "choice",
            "instructions": "What is it about?",
            "choices": [{"value": "money", "description": "payments"}, {"value": "delivery"}, {"value": True}],
        },
        {"type": "score", "instructions": "How angry?", "levels": [{"label": "calm"}, {"label": "angry"}]},
    ]
    decision = sdk.decisions.create(model="smollm2", input=TEXT, questions=questions)
    refund, topic, anger = decision.answers
    assert refund.type == "predicate" and refund.name == "refund"
    own = engine.decide(TEXT, Predicate("Is the customer asking for a refund?"))
    assert refund.probability == pytest.approx(own.probabilities["Yes"], abs=1e-6)
    assert topic.type == "choice" and topic.choice in ("money", "delivery", True)
    assert sum(one.probability for one in topic.probabilities) == pytest.approx(1)
    assert anger.type == "score" and 0 <= anger.score <= 1
    assert decision.usage.input_tokens_details.cached_tokens > 50


def test_system_one_answers_by_name(client: httpx.Client, engine: InferenceEngine) -> None:
    questions: Any = {
        "refund": {"type": "noul", "instructions": "Is the customer asking for a refund?"},
        "urgency": {"type": "choice", "instructions": "How urgent?", "criteria": {"low": "can wait", "high": None}},
        "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "annoyed", "angry"]},
    }
    answers = ollama.Client(host=str(client.base_url)).systemone("smollm2", TEXT, questions).answers
    assert list(answers) == list(questions)
    own = engine.decide(TEXT, Choice("How urgent?", {"low": "can wait", "high": None}))
    assert answers["urgency"].probabilities == pytest.approx(own.probabilities, abs=1e-6)  # type: ignore[union-attr]
    assert answers["anger"].legend == {"0": "calm", "1": "annoyed", "2": "angry"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "questions"),
    [
        ("/v1/decisions", [{"type": "predicate", "instructions": "Is it late?", "weight": 2}]),
        ("/v1/systemone", {"late": {"type": "noul", "instructions": "Is it late?", "weight": 2}}),
    ],
)
def test_skipped_fields_are_named(client: httpx.Client, path: str, questions: Any) -> None:
    body = {"input": "x", "state": "x", "questions": questions, "temperature": 0.5, "colour": "blue"}
    del body["state" if path == "/v1/decisions" else "input"]
    response = client.post(path, json=body)
    assert response.status_code == 200
    assert response.headers["x-mnemos-ignored"] == "colour, temperature, questions.weight"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/decisions", {"questions": [{"type": "box"}]}, 400, "predicate, choice"),
        ("/v1/decisions", {"questions": []}, 400, "questions"),
        (
            "/v1/decisions",
            {"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}]},
            400,
            "2 to",
        ),
        ("/v1/systemone", {"questions": {"a": {"type": "noul"}}}, 422, "what is asked"),
        ("/v1/systemone", {"questions": {"a": {"type": "score", "instructions": "x"}}}, 422, "criteria"),
    ],
)
def test_malformed_questions_are_named(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = client.post(path, json={"input": "x", "state": "x", **body})
    assert response.status_code == status and words in response.json()["error"]["message"]
