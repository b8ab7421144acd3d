"""Messages, as Anthropic's own client and its agents send and read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOL: Any = {"name": "get_weather", "description": "The weather", "input_schema": SCHEMA}
SYSTEM = "Be brief. " * 40
ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def sdk(client: httpx.Client) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=str(client.base_url), api_key="any", max_retries=0) as sdk:
        yield sdk


def test_a_message_is_answered_whole_and_streamed_alike(sdk: anthropic.Anthropic) -> None:
    whole = sdk.messages.create(model="smollm2", max_tokens=16, messages=ASKED, system=SYSTEM)
    assert whole.type == "message" and whole.role == "assistant" and whole.content[0].type == "text"
    assert whole.usage.output_tokens <= 16 and whole.stop_reason in ("end_turn", "max_tokens")
    blocks = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
    with sdk.messages.stream(model="smollm2", max_tokens=16, messages=ASKED, system=blocks) as stream:  # type: ignore[arg-type]
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text  # type: ignore[union-attr]
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens and final.usage.input_tokens >= 1  # the prompt was known


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_a_forced_tool_use(sdk: anthropic.Anthropic, choice: Any) -> None:
    request: Any = {"model": "smollm2", "max_tokens": 80, "messages": ASKED, "tools": [TOOL], "tool_choice": choice}
    whole = sdk.messages.create(**request)
    (block,) = whole.content
    assert block.type == "tool_use" and block.name == "get_weather" and set(block.input) == {"city"}
    assert whole.stop_reason == "tool_use"
    with sdk.messages.stream(**request) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[0].input == block.input  # type: ignore[union-attr]
    result = {
        "type": "tool_result",
        "tool_use_id": block.id,
        "content": [{"type": "text", "text": "Sunny"}],
        "is_error": False,
    }
    follow: Any = [
        *ASKED,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [result, {"type": "text", "text": "Thanks. And now?"}]},
    ]
    assert sdk.messages.create(**{**request, "messages": follow, "tool_choice": {"type": "none"}}).content


def test_a_stop_sequence_is_named(sdk: anthropic.Anthropic) -> None:
    said = {"regex": "It is Paris\\."}
    message = sdk.messages.create(
        model="smollm2", max_tokens=40, messages=ASKED, stop_sequences=["Par"], extra_body=said
    )
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == "Par"
    assert message.content[0].text == "It is "  # type: ignore[union-attr]


def test_counting_is_what_the_prompt_takes(sdk: anthropic.Anthropic) -> None:
    counted = sdk.messages.count_tokens(model="smollm2", messages=ASKED, tools=[TOOL]).input_tokens
    usage = sdk.messages.create(model="smollm2", max_tokens=1, messages=ASKED, tools=[TOOL]).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_an_agents_changing_header_does_not_reach_the_prompt(client: httpx.Client) -> None:
    def count(*blocks: str) -> int:
        system = [{"type": "text", "text": text} for text in blocks]
        body = {"model": "smollm2", "messages": ASKED, "system": system}
        return int(client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"])

    assert count("x-anthropic-billing-header: cc_version=1; cch=ab12", "Be brief.") == count("Be brief.")


def test_what_agents_send_besides_is_taken(client: httpx.Client) -> None:
    body = {
        "model": "smollm2",
        "max_tokens": 3,
        "messages": ASKED,
        "metadata": {"user_id": "x"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}],
    }
    response = client.post("/v1/messages?beta=true", json=body, headers={"anthropic-version": "2023-06-01"})
    assert response.status_code == 200 and response.headers["request-id"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
        ({"tool_choice": {"type": "any"}}, "there are none"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens"),
    ],
)
def test_errors_have_the_protocols_form(client: httpx.Client, fields: dict[str, Any], words: str) -> None:
    response = client.post("/v1/messages", json={"model": "smollm2", "max_tokens": 4, "messages": ASKED, **fields})
    assert response.status_code == 400
    content = response.json()
    assert content["type"] == "error" and content["error"]["type"] == "invalid_request_error"
    assert words in content["error"]["message"]


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_answer_follows_a_schema(sdk: anthropic.Anthropic, field: str) -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    body = {field: {"format": wanted} if field == "output_config" else wanted}
    message = sdk.messages.create(model="smollm2", max_tokens=40, messages=ASKED, extra_body=body)
    (block,) = message.content
    assert block.type == "text" and set(json.loads(block.text)) == {"city"}
    with pytest.raises(anthropic.BadRequestError, match=f"{field}.* must be .*json_schema"):
        body = {field: {"format": {"type": "x"}} if field == "output_config" else {"type": "x"}}
        sdk.messages.create(model="smollm2", max_tokens=40, messages=ASKED, extra_body=body)


def test_models_are_listed(sdk: anthropic.Anthropic) -> None:
    (model,) = sdk.models.list()
    assert model.id == model.display_name == "smollm2" and model.created_at.year >= 2025
    assert sdk.models.retrieve("smollm2") == model
