"""What hostile requests must not achieve: a failure of the server, a stall, or a look inside."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

USER = {"role": "user", "content": "Hi"}
CHAT = "/v1/chat/completions"
# Paths with a small body that each answers, and where its numbers are.
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1, "store": False},
    "/v1/messages": {"messages": [USER], "max_tokens": 1},
    "/api/chat": {"messages": [USER], "stream": False, "options": {"num_predict": 1}},
    "/api/generate": {"prompt": "Hi", "stream": False, "options": {"num_predict": 1}},
}
# As JSON text: json.dumps cannot write all of them.
NUMBERS = ("-1", str(2**31), str(2**64), "1e400", f"1{'0' * 400}", "true", "[]")
SHARED = ("n", "best_of", "max_tokens", "min_tokens", "top_k", "temperature", "seed", "prompt_logprobs", "priority")
FIELDS = {
    CHAT: (
        *SHARED,
        "max_completion_tokens",
        "top_logprobs",
        "thinking_token_budget",
        "repetition_penalty",
        "num_beams",
    ),
    "/v1/completions": (*SHARED, "logprobs", "truncate_prompt_tokens", "min_p", "presence_penalty", "max_time"),
    "/v1/responses": ("max_output_tokens", "top_logprobs", "temperature", "top_p", "top_k", "max_tool_calls"),
    "/v1/messages": ("max_tokens", "temperature", "top_p", "top_k"),
    "/api/chat": ("top_logprobs", "keep_alive"),
    "/api/generate": ("top_logprobs",),
}
OPTIONS = ("temperature", "top_k", "top_p", "repeat_penalty", "repeat_last_n", "seed", "mirostat_tau")


@pytest.fixture(autouse=True)
def no_failure(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test the server still answers, and its log has no trace of a failure."""
    with caplog.at_level(logging.ERROR):
        yield
        assert post(client, CHAT, BODIES[CHAT]).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def post(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """The response to a body, given as JSON text or as a value."""
    content = body if isinstance(body, str) else json.dumps(body)
    return client.post(path, content=content, headers={"content-type": "application/json"})


def with_field(body: dict[str, Any], name: str, text: str) -> str:
    """A body as JSON text, with a field whose value is given as JSON text."""
    marked = json.dumps({**body, name: "VALUE"})
    return marked.replace('"VALUE"', text)


def assert_clean(response: httpx.Response, *statuses: int) -> None:
    """An error has the status, arrives quickly, and shows nothing of the server's inside."""
    assert response.status_code in statuses, response.text[:500]
    assert response.elapsed.total_seconds() < 5
    for secret in ("Traceback", "/src/", "site-packages", "object at 0x", ".py"):
        assert secret not in response.text


@pytest.mark.parametrize("path", BODIES)
def test_numbers_of_any_size_and_type_are_answered_or_refused(client: httpx.Client, path: str) -> None:
    body = BODIES[path]
    requests = [with_field(body, name, value) for name in FIELDS[path] for value in NUMBERS]
    if "options" in body:
        options = [f'{{"num_predict": 1, "{name}": {value}}}' for name in OPTIONS for value in NUMBERS[3:]]
        requests += [with_field(body, "options", text) for text in options]
    for text in requests:
        response = post(client, path, text)
        assert_clean(response, 200, 400)
        assert response.status_code == 400 or "1e400" not in text, text


BROKEN = "\\ud800"  # half of a surrogate pair, as JSON writes it


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (CHAT, with_field(BODIES[CHAT], "metadata", f'{{"a": "{BROKEN}"}}')),
        (CHAT, with_field(BODIES[CHAT], "stop", f'"{BROKEN}"')),
        ("/v1/responses", with_field(BODIES["/v1/responses"], "metadata", f'{{"a": "{BROKEN}"}}')),
        ("/v1/responses", with_field(BODIES["/v1/responses"], "metadata", '{"a": 1e400}')),
        ("/v1/responses", with_field(BODIES["/v1/responses"], "previous_response_id", f'"{BROKEN}"')),
        ("/v1/messages", with_field(BODIES["/v1/messages"], "system", f'"{BROKEN}"')),
        ("/api/generate", with_field(BODIES["/api/generate"], "model", f'"{BROKEN}"')),
        (CHAT, with_field(BODIES[CHAT], "seed", "1" * 5000)),
        (CHAT, with_field(BODIES[CHAT], "logit_bias", f'{{"{"1" * 5000}": 1}}')),
        (CHAT, with_field(BODIES[CHAT], "dola_layers", f'"{"1" * 5000}"')),
    ],
)
def test_what_no_answer_could_repeat_is_refused(client: httpx.Client, path: str, text: str) -> None:
    assert_clean(post(client, path, text), 400)


def test_whole_characters_beyond_the_first_plane_are_taken(client: httpx.Client) -> None:
    body = with_field(BODIES[CHAT], "messages", '[{"role": "user", "content": "\\ud83d\\ude00"}]')
    assert post(client, CHAT, body).status_code == 200


@pytest.mark.parametrize("name", ["self", "messages", "tools", "tokenize", "add_generation_prompt", "chat_template"])
def test_variables_of_the_template_cannot_replace_the_servers_own(client: httpx.Client, name: str) -> None:
    response = post(client, CHAT, {**BODIES[CHAT], "chat_template_kwargs": {name: "x"}})
    assert_clean(response, 400)
    assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_other_variables_of_the_template_have_any_name(client: httpx.Client) -> None:
    names = ("mode", "name", "thinking", "continues", "conversation", "tokenizer", "budget", "parallel", "__class__")
    response = post(client, CHAT, {**BODIES[CHAT], "chat_template_kwargs": dict.fromkeys(names, True)})
    assert response.status_code == 200, response.text
