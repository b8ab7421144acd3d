"""Tool calls over HTTP: forced ones always parse, whatever the model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.running import events_of

PATH = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather in Paris for the next three days?"}],
    "tools": [WEATHER, TIME],
    "max_tokens": 120,
}


def check(arguments: str) -> None:
    found = json.loads(arguments)
    assert set(found) == {"city", "days"} and isinstance(found["city"], str) and 1 <= found["days"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_a_forced_call_has_valid_arguments(client: httpx.Client, choice: Any, sampling: dict[str, Any]) -> None:
    body = {**BODY, **sampling, "tool_choice": choice, "parallel_tool_calls": False}
    choice = client.post(PATH, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"]
    if call["function"]["name"] == "get_weather":
        check(call["function"]["arguments"])
    else:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_streamed_call_is_the_whole_one_in_pieces(client: httpx.Client) -> None:
    body = {**BODY, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    whole = client.post(PATH, json=body).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    choices = [chunk["choices"][0] for chunk in events_of(client, PATH, {**body, "stream": True})[:-1]]
    calls = [choice["delta"]["tool_calls"][0] for choice in choices if "tool_calls" in choice["delta"]]
    assert calls[0]["function"]["name"] == whole["name"] and calls[0]["id"] and calls[0]["type"] == "function"
    assert all(call["index"] == 0 and "id" not in call for call in calls[1:]) and len(calls) > 3
    assert "".join(call["function"]["arguments"] for call in calls) == whole["arguments"]
    check(whole["arguments"])
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_a_call_that_the_budget_cut_ends_with_length(client: httpx.Client) -> None:
    choice = client.post(PATH, json={**BODY, "tool_choice": "required", "max_tokens": 12}).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_conversation_with_results_goes_on(client: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    answer = client.post(PATH, json={**BODY, "messages": messages, "max_tokens": 10})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] > 100


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([{"type": "function", "function": {"name": "bad name"}}], "letters, digits"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "JSON schema"),
        ([{"type": "function", "function": {}}], "name"),
    ],
)
def test_malformed_tools_are_named(client: httpx.Client, tools: list[Any], words: str) -> None:
    response = client.post(PATH, json={**BODY, "tools": tools})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_tools_of_other_types_are_skipped(client: httpx.Client) -> None:
    response = client.post(PATH, json={**BODY, "tools": [{"type": "web_search"}, TIME], "max_tokens": 4})
    assert response.status_code == 200


def test_a_forced_answer_is_one_call_unless_several_are_asked_for(client: httpx.Client) -> None:
    body = {**BODY, "tools": [TIME], "tool_choice": "required"}
    (call,) = client.post(PATH, json=body).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_time", "arguments": "{}"}  # it has no parameters
    several = client.post(PATH, json={**body, "parallel_tool_calls": True, "max_tokens": 200}).json()["choices"][0]
    assert len(several["message"]["tool_calls"]) > 1


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": {}, "tools": [{"function": "x"}, 3]}},
        {"type": "function", "function": "get_time"},
        {"type": "function", "name": ["get_time"]},
        "get_time",
    ],
)
def test_a_choice_that_means_nothing_is_refused(client: httpx.Client, choice: Any) -> None:
    response = client.post(PATH, json={**BODY, "tool_choice": choice, "max_tokens": 1})
    if choice == {"type": "allowed_tools"}:  # allows none
        assert response.status_code == 200
    else:
        assert response.status_code == 400 and response.json()["error"]["param"] == "tool_choice"
