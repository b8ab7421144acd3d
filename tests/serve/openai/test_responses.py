"""`/v1/responses`: items, typed events, and conversations that the server remembers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mnemos.engine.answers import AnswerEvent, CallPiece, CallStart, End, Piece
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.keys import Keys
from mnemos.serve.openai.response_items import items_of, messages_of
from mnemos.serve.openai.response_store import ResponseStore, Stored
from mnemos.serve.openai.response_writer import ResponseWriter
from tests.serve.running import events_of, running

openai = pytest.importorskip("openai")
PATH = "/v1/responses"
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": "smollm2", "input": QUESTION, "max_output_tokens": 12, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def test_a_response_says_what_the_engine_does(client: httpx.Client, engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    own = engine.complete(engine.tokenizer.encode_chat(MESSAGES), max_new_tokens=12)
    response = ask(client)
    assert text_of(response) == own.text and response["id"].startswith("resp_")
    assert response["status"] == {"stop": "completed", "length": "incomplete"}[own.finish_reason]
    assert response["usage"]["input_tokens"] == own.usage.prompt_tokens
    assert response["usage"]["output_tokens"] == own.usage.completion_tokens


def test_a_cut_answer_is_incomplete(client: httpx.Client) -> None:
    response = ask(client, max_output_tokens=2)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("fields", [{}, {"top_logprobs": 2}, {"max_output_tokens": 2}])
def test_events_add_up_to_the_response(client: httpx.Client, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    events = events_of(client, PATH, {"input": QUESTION, "max_output_tokens": 12, "stream": True, **fields})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        f"response.{whole['status']}",
    ]  # fmt: skip
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == text_of(whole)
    final = events[-1]["response"]
    assert final["output"][0]["content"] == whole["output"][0]["content"] and final["usage"]["output_tokens"]
    assert {event.get("item_id", final["output"][0]["id"]) for event in events} == {final["output"][0]["id"]}


def test_the_client_library_reads_streams(client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as own:
        kinds, short = set(), {"regex": "It is [A-Z]{3}"}
        with own.responses.stream(model="smollm2", input=QUESTION, extra_body=short) as stream:
            for event in stream:
                kinds.add(event.type)
            final = stream.get_final_response()
        assert final.output_text == text_of(ask(client, **short)) and "response.completed" in kinds
        created = own.responses.create(model="smollm2", input=QUESTION, max_output_tokens=3)
        assert own.responses.retrieve(created.id).output_text == created.output_text
        assert own.responses.input_items.list(created.id).data[0].content == QUESTION
        counted = own.responses.input_tokens.count(model="smollm2", input="Why?", previous_response_id=created.id)
        answer = own.responses.create(
            model="smollm2", input="Why?", previous_response_id=created.id, max_output_tokens=1
        )
        assert counted.input_tokens == answer.usage.input_tokens
        own.responses.delete(created.id)
        with pytest.raises(openai.NotFoundError):
            own.responses.retrieve(created.id)


def test_a_conversation_continues(client: httpx.Client, engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    first = ask(client, instructions="Be brief.")
    second = ask(client, input="And of Spain?", previous_response_id=first["id"])
    third = ask(client, input="Why?", previous_response_id=second["id"])
    turns = [QUESTION, text_of(first), "And of Spain?", text_of(second), "Why?"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    assert third["usage"]["input_tokens"] == len(engine.tokenizer.encode_chat(messages))
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > 0
    streamed = events_of(client, PATH, {"input": "x", "max_output_tokens": 2, "stream": True})[-1]["response"]
    assert client.get(f"{PATH}/{streamed['id']}").json() == streamed


def test_what_is_not_stored_cannot_be_continued(client: httpx.Client) -> None:
    unstored = ask(client, store=False)
    for name in (unstored["id"], "resp_none"):
        response = client.post(PATH, json={"input": "a", "previous_response_id": name})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "previous_response_not_found"
    assert client.get(f"{PATH}/{unstored['id']}").status_code == 404
    assert client.delete(f"{PATH}/{unstored['id']}").status_code == 404


def test_nobody_sees_another_callers_responses(engine: InferenceEngine) -> None:
    with running(app(engine, name="m", keys=Keys(["one", "two"]))) as client:
        first, second = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = client.post(PATH, json={"input": "a", "max_output_tokens": 1}, headers=first).json()
        assert client.get(f"{PATH}/{made['id']}", headers=first).status_code == 200
        assert client.get(f"{PATH}/{made['id']}", headers=second).status_code == 404
        assert client.delete(f"{PATH}/{made['id']}", headers=second).status_code == 404


def test_requests_of_coding_agents_are_answered(client: httpx.Client) -> None:
    request = {
        "model": "smollm2",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "ls"}],
             "encrypted_content": None},
            {"type": "function_call", "name": "shell", "arguments": '{"command": "ls"}', "call_id": "c1"},
            {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        ],
        "tools": [
            {"type": "function", "name": "shell", "description": "Runs", "strict": False,
             "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}},
            {"type": "web_search", "external_web_access": False},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
            {"type": "namespace", "name": "mcp", "tools": []},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "abc",
        "text": {"verbosity": "low"},
        "client_metadata": {"a": "b"},
        "max_output_tokens": 3,
    }  # fmt: skip
    with client.stream("POST", PATH, json=request) as response:
        lines = list(response.iter_lines())
        ignored = response.headers["x-mnemos-ignored"].split(", ")
    assert ignored == ["client_metadata", "item:web_search_call", "tool:web_search", "tool:custom", "tool:namespace"]
    assert "event: response.incomplete" in lines


@pytest.mark.parametrize(
    "fields",
    [
        {
            "tools": [{"type": "function", "name": {}}],
            "tool_choice": {"type": "allowed_tools", "tools": [{"name": {}}]},
        },
        {"tool_choice": {"type": "allowed_tools", "tools": 1.5}},
        {"input": [{"type": "reasoning", "content": 1.5}, {"role": "user", "content": "a"}]},
        {"input": [{"type": "reasoning", "summary": [None, {"text": 1}]}, {"role": "user", "content": "a"}]},
        {"input": [{"type": "function_call", "name": 1, "arguments": [1]}]},
        {"input": [{"type": "function_call_output", "output": {}}]},
        {"reasoning": {"effort": {}}},
    ],
)
def test_malformed_parts_are_no_failure_of_the_server(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post(PATH, json={"input": "a", "max_output_tokens": 1, **fields})
    assert response.status_code in (200, 400), response.text


def test_names_of_what_is_skipped_cannot_write_headers(client: httpx.Client) -> None:
    hostile = "x\r\nset-cookie: a=b\u2028\u00e9"
    items = [{"role": "user", "content": "a"}, {"type": hostile}]
    request = {"input": items, "tools": [{"type": hostile}], hostile: 1, "max_output_tokens": 1}
    response = client.post(PATH, json=request)
    assert response.status_code == 200 and "set-cookie" not in response.headers
    shown = response.headers["x-mnemos-ignored"].split(", ")
    assert shown == ["xset-cookie:ab", "item:xset-cookie:ab", "tool:xset-cookie:ab"]


def test_a_format_is_kept(client: httpx.Client) -> None:
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"enum": ["a", "b"]}}
    assert json.loads(text_of(ask(client, text={"format": form}))) in ("a", "b")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "not empty"),
        ({"input": ["a"]}, "input[0]", "item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "previous_response_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/"}]}]},
            "input",
            "text",
        ),
        ({"input": "word " * 3000}, "input", "maximum context length"),
        ({"background": True}, "background", "waits"),
        ({"n": 2}, "n", "one result"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"text": {"format": "json"}}, "text.format", "object"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "one of the tools"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_output_tokens"),
        ({"guided_regex": "("}, "guided_regex", "enforced"),
        ({"messages": MESSAGES}, "messages", "input"),
        ({"truncation": "none"}, "truncation", "auto"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.post(PATH, json={"input": "a", "max_output_tokens": 2, "stream": True, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error


def test_calls_and_reasoning_become_items_of_their_own() -> None:
    writer = ResponseWriter({}, None, None)
    arriving: list[AnswerEvent] = [
        Piece(0, "hm", (), "reasoning"), Piece(0, "m", (), "reasoning"), Piece(0, "Let me see."),
        CallStart(0, 0, "c0", "add"), CallPiece(0, 0, '{"a"'), CallPiece(0, 0, ": 1}"),
        CallStart(0, 1, "c1", "now"), CallPiece(0, 1, "{}"), End(0, "tool_calls"),
    ]  # fmt: skip
    events = [json.loads(line[6:]) for event in arriving for line in writer.add(event).splitlines() if line[:1] == "d"]
    reasoning, message, add, now = writer.output
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hmm"}] and reasoning["status"] == "completed"
    assert message["content"][0]["text"] == "Let me see."
    assert (add["name"], add["arguments"], add["call_id"]) == ("add", '{"a": 1}', "c0")
    assert (now["name"], now["arguments"], now["call_id"]) == ("now", "{}", "c1")
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2, 3]
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert pieces == ['{"a"', ": 1}", "{}"]
    messages, skipped = messages_of(writer.output)
    assert skipped == [] and [message["role"] for message in messages] == ["assistant"]
    assert messages[0]["reasoning_content"] == "hmm" and len(messages[0]["tool_calls"]) == 2


def stored(name: str, previous: str | None = None, size: int = 0) -> Stored:
    response = {"id": name, "output": [{"type": "message", "role": "assistant", "content": name + "x" * size}]}
    return Stored(response, items_of(f"asked {name}"), previous)


def test_the_store_forgets_the_oldest_and_the_old(tmp_path: Any) -> None:
    file = str(tmp_path / "responses.db")
    store = ResponseStore(file, most=6000)
    store.put("me", stored("a"))
    store.put("me", stored("b", "a"))
    assert [item["content"] for item in store.history("me", "b") or ()] == ["asked a", "a", "asked b", "b"]
    stored_c = stored("c", None, 5500)
    store.put("me", stored_c)
    assert store.get("me", "a") is None and store.get("me", "c") == stored_c and store.get("you", "c") is None
    store.close()
    again = ResponseStore(file, most=6000)
    assert again.get("me", "c") == stored_c
    assert again.history("me", "b") is None
    again.close()
    old = ResponseStore(file, keep=0)
    assert old.get("me", "c") is None
    old.close()
