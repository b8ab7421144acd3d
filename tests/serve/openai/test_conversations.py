"""What clients put into conversations, and what they rely on in the answers."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine
from tests.serve.running import events_of

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Count from one to five."}


def ask(client: httpx.Client, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": messages, "max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def prompt_of(client: httpx.Client, engine: InferenceEngine, messages: list[dict[str, Any]], **fields: Any) -> str:
    """The prompt as the model reads it."""
    answer = ask(client, messages, max_completion_tokens=1, return_token_ids=True, **fields)
    assert engine.tokenizer is not None
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])
    return engine.tokenizer.decode(answer["prompt_token_ids"], skip_special=False)


def test_content_in_parts_is_the_joined_text(client: httpx.Client, engine: InferenceEngine) -> None:
    parts = [{"type": "text", "text": "Count from"}, {"type": "input_text", "text": "one to five."}]
    whole = {"role": "user", "content": "Count from\none to five."}
    assert prompt_of(client, engine, [{"role": "user", "content": parts}]) == prompt_of(client, engine, [whole])


def test_a_developer_speaks_as_the_system(client: httpx.Client, engine: InferenceEngine) -> None:
    prompts = [
        prompt_of(client, engine, [{"role": role, "content": "Be brief."}, USER]) for role in ("developer", "system")
    ]
    assert prompts[0] == prompts[1] and "Be brief." in prompts[0]


@pytest.mark.parametrize(
    "more",
    [
        [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
         {"role": "tool", "tool_call_id": "c1", "content": "the sum is 3"}],
        [{"role": "assistant", "content": "the sum is 3", "reasoning_content": "hm", "refusal": None}, USER],
        [{"role": "user", "content": "the sum is 3", "name": "Ada"}],
        [{"role": "assistant", "content": "the sum is 3"}, {"role": "assistant", "content": "yes"}, USER],
    ],
)  # fmt: skip
def test_what_clients_send_is_read(client: httpx.Client, engine: InferenceEngine, more: list[dict[str, Any]]) -> None:
    assert "the sum is 3" in prompt_of(client, engine, [USER, *more])


def test_an_assistants_last_message_is_continued(client: httpx.Client, engine: InferenceEngine) -> None:
    started = [USER, {"role": "assistant", "content": "One, two,"}]
    assert prompt_of(client, engine, started).endswith("One, two,")
    assert not prompt_of(client, engine, started, add_generation_prompt=True).endswith("One, two,")


def test_names_of_control_tokens_in_a_message_are_text(client: httpx.Client, engine: InferenceEngine) -> None:
    answer = ask(client, [{"role": "user", "content": "<|im_end|>"}], return_token_ids=True)
    assert engine.tokenizer is not None
    (end,) = engine.tokenizer.encode("<|im_end|>")
    plain = ask(client, [{"role": "user", "content": "x"}], return_token_ids=True)
    assert answer["prompt_token_ids"].count(end) == plain["prompt_token_ids"].count(end)


def test_usage_in_every_chunk_never_falls(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = {"messages": [USER], "max_tokens": 8, "stream": True, "stream_options": options}
    *chunks, _ = events_of(client, PATH, request)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    assert counts == sorted(counts) and counts[-1] == 8 and len(counts) >= len(chunks) - 1
    assert chunks[-1]["choices"] == []


def test_without_being_asked_a_stream_has_no_usage(client: httpx.Client) -> None:
    chunks = events_of(client, PATH, {"messages": [USER], "max_tokens": 3, "stream": True, "stream_options": {}})
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks[:-1])


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 7}, {"n": 3, "seed": 7}])
def test_a_seed_makes_a_text_whatever_the_cache_holds(client: httpx.Client, fields: dict[str, Any]) -> None:
    answers = [ask(client, [{"role": "user", "content": "Tell me of " + "the sea and " * 20}], **fields) for _ in "ab"]
    texts = [[choice["message"]["content"] for choice in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) == len(texts[0])
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[1] > 0


def test_a_stop_string_over_tokens_is_never_shown(client: httpx.Client) -> None:
    request = {"messages": [USER], "max_tokens": 40}
    text = ask(client, [USER], max_tokens=40)["choices"][0]["message"]["content"]
    stop = text[7:16]  # it begins and ends inside of tokens
    answer = ask(client, [USER], max_tokens=40, stop=[stop])["choices"][0]
    assert answer["message"]["content"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop" and answer["stop_reason"] == stop
    *chunks, _ = events_of(client, PATH, {**request, "stop": stop, "stream": True})
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == text[: text.index(stop)]
    shown = ask(client, [USER], max_tokens=40, stop=[stop], include_stop_str_in_output=True)
    assert shown["choices"][0]["message"]["content"] == text[: text.index(stop)] + stop


def test_characters_of_several_tokens_arrive_whole(client: httpx.Client) -> None:
    request = {"messages": [USER], "guided_regex": "(\U0001f980|\u6f22\u5b57){3}", "max_tokens": 40, "stream": True}
    *chunks, _ = events_of(client, PATH, request)
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert re.fullmatch("(\U0001f980|\u6f22\u5b57){3}", "".join(pieces)) and "\ufffd" not in "".join(pieces)


def test_a_bias_has_ids_as_text(client: httpx.Client, engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    (word,) = engine.tokenizer.encode("moon")
    answer = ask(client, [USER], logit_bias={str(word): 100}, max_tokens=3)
    assert answer["choices"][0]["message"]["content"] == "moonmoonmoon"


def test_an_answer_without_a_limit_ends_by_itself(client: httpx.Client) -> None:
    response = client.post(PATH, json={"messages": [USER], "logit_bias": {"2": 8}})
    assert response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"type": "json_object"}, r"\{.*\}"),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"const": 5}}}, "5"),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", "b"]}}}, '"[ab]"'),
    ],
)
def test_an_answer_fits_its_format(client: httpx.Client, wanted: dict[str, Any], pattern: str) -> None:
    choice = ask(client, [USER], response_format=wanted, max_tokens=100)["choices"][0]
    content = choice["message"]["content"].strip()
    assert re.fullmatch(pattern, content, re.DOTALL) or (choice["finish_reason"] == "length" and content[0] == "{")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "magic"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.org/a"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": {"type": "array", "uniqueItems": True}},
            }
        },
        {"guided_grammar": "start: ["},
        {"structured_outputs": {"regex": "a{5"}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://[::1]/"}}]}]},
        {"messages": [{"role": 5, "content": "a"}]},
        {"messages": [{"content": "a"}]},
        {"n": 0},
        {"temperature": 1e300},
        {"top_p": 2},
        {"tools": [{"type": "function"}] * 600},
        {"stop": [""]},
        {"cache_salt": 5},
        {"cache_salt": "x" * 5000},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_before_it_begins(
    client: httpx.Client, fields: dict[str, Any], stream: bool
) -> None:
    response = client.post(PATH, json={"messages": [USER], "max_tokens": 4, "stream": stream, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and set(error) >= {"param", "code"}
    assert ask(client, [USER], max_tokens=1)["choices"][0]["finish_reason"] == "length"  # the server lives on
