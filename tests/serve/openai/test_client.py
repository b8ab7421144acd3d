"""OpenAI's own client library against the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as own:
        yield own


MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    # The client raises an error for an answer that was cut.
    request: Any = {
        "model": "smollm2",
        "messages": MESSAGES,
        "logprobs": True,
        "extra_body": {"regex": "It is [A-Z]{3}"},
    }
    whole = client.chat.completions.create(**request)
    with client.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert [entry.logprob for entry in final.choices[0].logprobs.content] == [
        entry.logprob for entry in whole.choices[0].logprobs.content
    ]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt=["a b c", "1 2 3"], max_tokens=3, echo=True, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("1 2 3") and answer.choices[1].logprobs.token_logprobs[0] is None


def test_errors_are_the_librarys_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert [model.id for model in client.models.list()] == ["smollm2"]


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.mark.slow
def test_calls_arrive_in_both_protocols(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    with client.chat.completions.stream(
        model="smollm2",
        messages=messages,
        max_tokens=60,
        tools=[{"type": "function", "function": WEATHER}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")
    with client.responses.stream(
        model="smollm2",
        input=messages,
        max_output_tokens=60,
        tools=[{"type": "function", **WEATHER}],
        tool_choice={"type": "function", "name": "weather"},
    ) as stream:
        response = stream.get_final_response()
    call = response.output[0]
    assert response.status == "completed" and (call.type, call.name) == ("function_call", "weather")
    answer = client.responses.create(
        model="smollm2",
        previous_response_id=response.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny, 25 degrees"}],
        max_output_tokens=20,
    )
    assert answer.output_text
