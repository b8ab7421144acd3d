"""Typed decisions over HTTP: OpenAI's `/v1/decisions` and System One's `/v1/systemone`."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from mnemos.engine.decide import Choice, Decision, Predicate, Question, Score, question_of
from mnemos.errors import MnemosError, shown
from mnemos.serve.body import Body
from mnemos.serve.connection import Connection, connection_of
from mnemos.serve.generation import extra_fields, ignore, salted
from mnemos.serve.openai.response_items import items_of, messages_of
from mnemos.serve.refusal import Refusal, refusal_of
from mnemos.serve.state import server_of

router = APIRouter(tags=["decisions"])
MOST_QUESTIONS = 400
_OPENAI_QUESTION = ("type", "name", "instructions", "choices", "levels")
_SYSTEM_ONE_QUESTION = ("type", "instructions", "criteria")


class DecisionsRequest(Body):
    """`POST /v1/decisions`."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    questions: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_QUESTIONS)


class SystemOneRequest(Body):
    """`POST /v1/systemone`."""

    model: str | None = None
    state: str | dict[str, Any] | list[Any]
    questions: dict[str, dict[str, Any]] = Field(min_length=1, max_length=MOST_QUESTIONS)


@router.post("/v1/decisions")
async def decisions(body: DecisionsRequest, request: Request) -> dict[str, Any]:
    """Answers questions about an input, in their order."""
    _name_skipped(body, body.questions, _OPENAI_QUESTION, connection_of(request))
    if isinstance(body.input, str):
        about: Any = body.input
    else:
        about, _ = messages_of(items_of(body.input))
    questions = [_openai_question(given, f"questions[{n}]") for n, given in enumerate(body.questions)]
    model, answers = await _answers(body.model, about, questions, request)
    shown_answers = [_openai_answer(given, answer) for given, answer in zip(body.questions, answers, strict=True)]
    prompt_tokens, cached = (sum(getattr(one, name) for one in answers) for name in ("prompt_tokens", "cached_tokens"))
    usage = {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens,
    }
    return {"object": "decision", "model": model, "answers": shown_answers, "usage": usage}


@router.post("/v1/systemone")
async def system_one(body: SystemOneRequest, request: Request) -> dict[str, Any]:
    """Answers named questions about a state."""
    _name_skipped(body, list(body.questions.values()), _SYSTEM_ONE_QUESTION, connection_of(request))
    try:
        questions = [
            question_of({**given, "instructions": _text(given.get("instructions"))}, f"questions.{name[:80]}")
            for name, given in body.questions.items()
        ]
        model, answers = await _answers(body.model, _text(body.state), questions, request)
    except MnemosError as error:
        raise Refusal(422, str(error)) from error
    named = zip(body.questions, answers, strict=True)
    return {
        "model": model,
        "answers": {name: _system_one_answer(answer) for name, answer in named},
        "usage": {"input_tokens": sum(answer.prompt_tokens for answer in answers), "output_tokens": 0},
    }


def _name_skipped(body: Body, questions: list[dict[str, Any]], known: tuple[str, ...], connection: Connection) -> None:
    """Names the fields that are left out: unknown ones, and those of generation, which decisions do without."""
    ignore(connection, extra_fields(body.further, tuple(type(body).model_fields), connection))
    further = {name: None for question in questions for name in question if name not in known}
    ignore(connection, [f"questions.{name}" for name in further])


async def _answers(
    name: str | None, about: Any, questions: list[Question], request: Request
) -> tuple[str, list[Decision]]:
    state, connection = server_of(request), connection_of(request)
    model = await state.hold(name, connection)
    caller = connection.caller
    scheduling = {
        "tenant": caller.tenant,
        "cache_salt": salted(caller, "decide"),
        "adapter": model.offer.defaults.get("adapter"),
    }
    # The first question brings the input into the cache; the others, which begin with it, find it there.
    found: list[Decision] = []
    try:
        for wave in (questions[:1], questions[1:]):
            handles = await model.in_thread(
                lambda some: [model.engine.submit_decision(about, one, **scheduling) for one in some], wave
            )
            for handle in handles:
                connection.start(handle)
            found += [await handle for handle in handles]
    except MnemosError as error:
        raise refusal_of(error) from error
    connection.notes["model"] = model.name
    return model.name, found


def _openai_question(given: dict[str, Any], where: str) -> Question:
    kind, text = given.get("type"), _text(given.get("instructions"))
    if kind == "predicate":
        question: Question = Predicate(text)
    elif kind == "choice" and isinstance(given.get("choices"), list):
        choices = [one if isinstance(one, dict) else {} for one in given["choices"]]
        question = Choice(text, {_label(one.get("value")): one.get("description") for one in choices})
        if len(question.labels) < len(choices):
            raise Refusal(400, f"{where}.choices has a value twice; choices must differ", param="questions")
    elif kind == "score" and isinstance(given.get("levels"), list):
        levels = [one if isinstance(one, dict) else {} for one in given["levels"]]
        question = Score(text, [": ".join(filter(None, (one.get("label"), one.get("description")))) for one in levels])
    else:
        raise Refusal(
            400,
            f"{where}.type is {shown(kind)}; it must be predicate, choice with choices, or score with levels",
            param="questions",
        )
    try:
        return question_of(question, where)
    except MnemosError as error:
        raise Refusal(400, str(error), param="questions") from error


def _openai_answer(given: dict[str, Any], answer: Decision) -> dict[str, Any]:
    head = {"type": given["type"], "name": given.get("name")}
    if given["type"] == "predicate":
        return {**head, "probability": answer.probabilities["Yes"]}
    values = list(answer.probabilities.values())
    if given["type"] == "choice":
        labels = [one["value"] for one in given["choices"]]
        rows = [{"value": value, "probability": share} for value, share in zip(labels, values, strict=True)]
        best = max(range(len(values)), key=values.__getitem__)
        return {**head, "choice": labels[best], "confidence": answer.confidence, "probabilities": rows}
    levels = [
        {"label": one.get("label"), "value": number, "probability": share}
        for number, (one, share) in enumerate(zip(given["levels"], values, strict=True))
    ]
    return {**head, "score": answer.answer, "confidence": answer.confidence, "probabilities": levels}


def _system_one_answer(answer: Decision) -> dict[str, Any]:
    question = answer.question
    if isinstance(question, Predicate):
        return {"type": "noul", "noul": answer.probabilities["Yes"]}
    further = {"probabilities": answer.probabilities, "confidence": answer.confidence}
    if isinstance(question, Choice):
        return {"type": "choice", "choice": answer.answer, **further}
    legend = {str(number): level for number, level in enumerate(question.levels)}
    return {"type": "score", "score": answer.answer, "legend": legend, **further}


def _label(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else value


def _text(content: Any) -> str:
    """Text as it is, parts joined, anything else as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "\n".join(part["text"] for part in content)
    return "" if content is None else json.dumps(content, ensure_ascii=False, indent=1)
