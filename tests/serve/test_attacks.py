"""What hostile requests must not achieve: a failure of the server, a stall, or a look inside."""

from __future__ import annotations

import gc
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from mnemos.decoding.grammar import GrammarConstraint
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import ROUTERS, app
from mnemos.serve.keys import Keys
from mnemos.serve.settings import Settings
from tests.serve.running import running

pytestmark = pytest.mark.slow

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
    """An error has the status, arrives soon, and shows nothing of the server's inside."""
    assert response.status_code in statuses, response.text[:500]
    assert response.elapsed.total_seconds() < 20
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


BEYOND = 10**6  # no token id of the vocabulary
FAILING: list[dict[str, Any]] = [
    {"logit_bias": {str(BEYOND): 1}},
    {"stop_token_ids": [BEYOND]},
    {"bad_words_ids": [[BEYOND]]},
    {"allowed_token_ids": [BEYOND]},
    {"guided_grammar": "start: ["},
    {"guided_regex": "a{5"},
    {"guided_regex": "(?=a)b"},
    {"guided_regex": "(" * 5000},
    {"guided_json": "[" * 100_000},
    {"guided_json": '{"items":' * 900 + "{}" + "}" * 900},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    {"guided_json": {"$ref": "http://127.0.0.1:9/schema"}},
    {"guided_json": {"properties": 5}},
    {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(8)]} for i in range(12)]}},
]


def test_failing_requests_do_not_touch_the_ones_beside_them(client: httpx.Client) -> None:
    healthy = {"messages": [USER], "max_tokens": 120, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    alone = post(client, CHAT, healthy).json()["choices"]
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(post, client, CHAT, healthy)
        for fields in FAILING:
            assert_clean(post(client, CHAT, {**BODIES[CHAT], **fields}), 400)
        assert answer.result().json()["choices"] == alone
    assert client.get("/health").status_code == 200
    assert_clean(post(client, "/v1/completions", {"prompt": [BEYOND], "max_tokens": 1}), 400)
    assert_clean(post(client, "/v1/completions", {"prompt": [-1], "max_tokens": 1}), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a+)+b"},
        {"guided_regex": "(.*a){25}"},
        {"guided_regex": "(.*a.{400}){30}"},
        {"guided_json": {"type": "array", "minItems": 10**9}},
        {"guided_json": {"type": "string", "minLength": 10**9}},
        {"guided_json": {"type": "string", "pattern": "(a+)+b(.*a){40}"}},
        {"guided_json": {"enum": [str(number) for number in range(20_000)]}},
    ],
)
def test_constraints_that_could_take_for_ever_do_not(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert_clean(post(client, CHAT, {**BODIES[CHAT], **fields}), 200, 400)


def test_nothing_is_kept_of_many_different_constraints(client: httpx.Client) -> None:
    for number in range(30):
        assert post(client, CHAT, {**BODIES[CHAT], "guided_json": {"const": number}}).status_code == 200
    gc.collect()
    assert sum(isinstance(one, GrammarConstraint) for one in gc.get_objects()) < 5


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [5]},
        {"role": "assistant", "tool_calls": [{"function": {"name": 5, "arguments": 7}}]},
        {"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f", "arguments": "{not json"}}]},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[" * 500}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "__import__('os')", "arguments": "1+1"}}]},
        {"role": "tool", "content": {"a": 1}},
        {"role": "tool", "tool_call_id": ["x"], "content": [[]]},
    ],
)
def test_malformed_calls_in_a_conversation_do_no_harm(client: httpx.Client, message: dict[str, Any]) -> None:
    body = {"messages": [USER, message, USER], "max_tokens": 1}
    assert_clean(post(client, CHAT, body), 200, 400)
    assert_clean(post(client, "/api/chat", {**body, "stream": False, "options": {"num_predict": 1}}), 200, 400, 422)


def test_errors_do_not_repeat_the_prompt(client: httpx.Client) -> None:
    secret = "the password is swordfish"
    long = {"messages": [{"role": "user", "content": f"{secret} " * 1000}], "max_tokens": 1}
    for response in (
        post(client, CHAT, long),
        post(client, CHAT, {"messages": [{"role": "user", "content": secret}], "temperature": -1}),
        post(client, "/v1/completions", {"prompt": secret, "guided_regex": "(", "max_tokens": 1}),
        post(client, CHAT, {**BODIES[CHAT], "model": "../../etc/passwd"}),
    ):
        assert_clean(response, 400, 404)
        assert "swordfish" not in response.text


@pytest.fixture(scope="module")
def closed(engine: InferenceEngine) -> Iterator[httpx.Client]:
    """A server with keys that gives bodies half a second."""
    application = app(engine, keys=Keys(["secret"]), settings=Settings(body_seconds=0.5))
    with running(application) as client:
        yield client


def test_every_route_of_the_application_needs_the_key(engine: InferenceEngine) -> None:
    application = app(engine, keys=Keys(["secret"]))
    direct: Any = application.app
    routes = [*direct.inner.routes, *(route for router in ROUTERS for route in router.routes)]
    paths = {route.path.replace("{name}", "x") for route in routes if hasattr(route, "path")} - application.open_paths
    assert paths >= {CHAT, "/metrics", "/openapi.json", "/engine/live"}
    with running(application) as client:
        for path in (*paths, "/x"):
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
                assert client.request(method, path).status_code == 401, (method, path)
        for path in application.open_paths:
            assert client.post(path).status_code == 401, path


def test_requests_of_one_id_are_different_requests(client: httpx.Client) -> None:
    def ask(text: str) -> str:
        body = {"prompt": text, "max_tokens": 4, "echo": True}
        response = client.post("/v1/completions", json=body, headers={"x-request-id": "same"})
        assert response.headers["x-request-id"] == "same"
        return str(response.json()["choices"][0]["text"])[: len(text)]

    texts = [f"{number} apples" for number in range(4)]
    with ThreadPoolExecutor(4) as beside:
        assert list(beside.map(ask, texts)) == texts


def first_line(client: httpx.Client, *parts: bytes) -> bytes:
    """The first line of what a server answers to raw bytes; empty if it closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as raw:
        try:
            for part in parts:
                raw.sendall(part)
            return raw.recv(200).split(b"\r\n")[0]
        except ConnectionError:
            return b""


@pytest.mark.parametrize(
    ("request_bytes", "codes"),
    [
        (b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"401", b"400", b"404", b"403")),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", (b"400",)),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", (b"400",)),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", (b"400", b"431")),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 65_000 + b"\r\n\r\n", (b"400", b"431")),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: a\r\nX-Api-Key: b\r\n\r\n", (b"400", b"401")),
        (b"GET /v1/models\x00/../health HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"400", b"404")),
    ],
)
def test_odd_requests_are_refused(closed: httpx.Client, request_bytes: bytes, codes: tuple[bytes, ...]) -> None:
    line = first_line(closed, request_bytes)
    assert line == b"" or line.split()[1] in codes
    assert closed.get("/health").status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(closed: httpx.Client) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: secret\r\nContent-Type: application/json\r\n"
    )
    assert first_line(closed, head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n").split()[1] == b"408"
    assert first_line(closed, head + b"Content-Length: 1000\r\n\r\n{").split()[1] == b"408"


def test_clients_cannot_add_labels_to_the_metrics(closed: httpx.Client) -> None:
    key = {"x-api-key": "secret"}

    def series() -> set[str]:
        lines = closed.get("/metrics", headers=key).text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith("mnemos_http_responses")}

    def send(start: int) -> None:
        for number in range(start, start + 20):
            closed.get(f"/path{number}", headers=key)
            closed.get(f"/v1/models/name{number}", headers=key)
            closed.request(f"VERB{number}", "/v1/models", headers=key)
            closed.post(CHAT, json={**BODIES[CHAT], "model": f"model{number}"}, headers=key)

    series()
    send(0)
    before = series()
    send(20)
    assert series() == before
    assert not any(word in line for line in before for word in ("path1", "name1", "VERB1", "model1"))
