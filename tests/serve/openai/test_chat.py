"""Chat completions: what OpenAI's clients rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mnemos.engine.answers import AnswerEvent, End, Piece
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.openai.chat import ChatAnswer
from tests.serve.running import events_of

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(PATH, json={"model": "smollm2", "messages": MESSAGES, "max_tokens": 12, **fields})


def test_an_answer_is_the_engines(client: httpx.Client, engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    own = engine.complete(engine.tokenizer.encode_chat(MESSAGES), max_new_tokens=12)
    answer = ask(client).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "smollm2"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": own.text}
    assert choice["finish_reason"] == own.finish_reason
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        own.usage.prompt_tokens,
        own.usage.completion_tokens,
    )
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("fields", [{}, {"n": 2, "temperature": 1.0, "seed": 5}, {"num_beams": 3}])
def test_a_stream_adds_up_to_the_whole_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields).json()
    request = {
        "messages": MESSAGES,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    *chunks, last, done = events_of(client, PATH, request)
    assert done == "[DONE]"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"] and own[-1]["delta"] == {}


def test_log_probabilities_join_to_the_text(client: httpx.Client) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3, max_tokens=30).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert text == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": -1}, "max_tokens", "at least 1"),
        ({"max_tokens": "12"}, "max_tokens", "valid integer"),
        ({"temperature": -1}, "temperature", "must be"),
        ({"temperatur": 1}, "temperatur", "did you mean temperature"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = ask(client, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"]


def test_a_prompt_beyond_the_context_is_refused_before_a_stream_begins(client: httpx.Client) -> None:
    response = ask(client, messages=[{"role": "user", "content": "word " * 3000}], stream=True)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    response = ask(client, model="/etc/passwd")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_fields_of_other_servers_are_named_and_skipped(client: httpx.Client) -> None:
    response = ask(client, user="me", client_metadata={"a": 1})
    assert response.status_code == 200 and response.headers["x-mnemos-ignored"] == "client_metadata"


def test_chunks_of_text_alone_have_the_fields_of_all_chunks(client: httpx.Client) -> None:
    request = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 12, "stream": True, "n": 2, "temperature": 0}
    plain = events_of(client, PATH, request)[:-1]
    more = events_of(client, PATH, {**request, "stream_options": {"continuous_usage_stats": True}})[:-1]
    seen = [{**chunk, "id": "", "created": 0} for chunk in plain]
    for chunk in more:
        chunk.pop("usage", None)
    wanted = [{**chunk, "id": "", "created": 0} for chunk in more]

    def order(chunk: dict[str, Any]) -> int:  # results arrive in any order among themselves
        return chunk["choices"][0]["index"]

    assert sorted(seen, key=order) == sorted(wanted, key=order)


def test_what_arrives_together_is_one_write() -> None:
    arrivals = [[Piece(0, "a")], [Piece(0, "b"), Piece(0, "c"), End(0, "stop")]]

    async def events() -> AsyncIterator[list[AnswerEvent]]:
        for arrived in arrivals:
            yield arrived

    running: Any = SimpleNamespace(
        events=events,
        model=SimpleNamespace(name="m", engine=SimpleNamespace(tokenizer=None)),
        config=SimpleNamespace(prompt_logprobs=None),
    )

    async def written() -> list[str]:
        return [text async for text in ChatAnswer(running, None, False).chunks(usage=False, continuous=False)]

    first, rest, last = asyncio.run(written())
    assert first.count("data: ") == 2 and '"content":"a"' in first  # with the role before it
    assert rest.count("data: ") == 3 and '"finish_reason":"stop"' in rest
    assert last == "data: [DONE]\n\n"
