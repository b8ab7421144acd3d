"""What editors and agents send: everything is answered, and what has no place here is skipped and named."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.running import events_of

OBJECT = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
FUNCTION = {
    "type": "function",
    "function": {"name": "read_file", "description": None, "strict": False, "parameters": OBJECT},
}


def texts(*parts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": part} for part in parts]


def message(role: str, *parts: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": texts(*parts, kind=kind)}


CODEX: dict[str, Any] = {
    "model": "smollm2",
    "instructions": "You are a coding agent.",
    "input": [
        message("developer", "<permissions instructions>"),
        message("user", "<environment_context>"),
        message("user", "List the files"),
        {"type": "reasoning", "id": "rs_1", "summary": texts("x", kind="summary_text"), "content": None,
         "encrypted_content": "gAAA"},
        {"type": "function_call", "id": "fc_1", "name": "shell", "arguments": '{"command": ["ls"]}', "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "a.txt"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "ok"},
        {"type": "local_shell_call", "call_id": "c3", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "c3", "output": texts("a.txt", kind="input_text")},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        message("assistant", "There is a.txt."),
        message("user", "Thanks"),
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "d", "strict": False, "parameters": OBJECT},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "web_search", "external_web_access": False},
        {"type": "namespace", "name": "mcp", "tools": []},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"x": "1"},
    "text": {"verbosity": "low"},
    "service_tier": "priority",
    "max_output_tokens": 3,
}  # fmt: skip


def test_codex(client: httpx.Client) -> None:
    response = client.post("/v1/responses", json=CODEX, headers={"originator": "codex_cli_rs", "session_id": "x"})
    assert response.status_code == 200, response.text
    ignored = response.headers["x-mnemos-ignored"].split(", ")
    assert {"client_metadata", "item:web_search_call", "tool:custom", "tool:web_search", "tool:namespace"} == set(
        ignored
    )
    names = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert names[0] == "response.created" and names[-1] in ("response.completed", "response.incomplete")


CLAUDE_CODE: dict[str, Any] = {
    "model": "smollm2",
    "max_tokens": 3,
    "stream": True,
    "system": [
        *texts("x-anthropic-billing-header: cch=1;"),
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "messages": [
        {"role": "user", "content": texts("<system-reminder>", "hi")},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
                {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"path": "x"}, "caller": {"type": "direct"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "tool_reference", "tool_name": "f"}]},
                *texts("go on"),
            ],
        },
    ],
    "tools": [
        {"name": "Bash", "description": "d", "input_schema": OBJECT, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "thinking": {"type": "adaptive", "display": "summarized"},
    "context_management": {"edits": []},
    "output_config": {"effort": "high"},
    "metadata": {"user_id": "u"},
    "speed": "fast",
}


def test_claude_code(client: httpx.Client) -> None:
    response = client.post("/v1/messages?beta=true", json=CLAUDE_CODE, headers={"anthropic-beta": "x"})
    assert response.status_code == 200, response.text
    ignored = set(response.headers["x-mnemos-ignored"].split(", "))
    kinds = ("redacted_thinking", "server_tool_use", "web_search_tool_result")
    assert ignored == {"tool:web_search_20250305", *(f"block:{kind}" for kind in kinds)}
    assert response.text.rstrip().endswith('{"type":"message_stop"}')
    counted = {name: CLAUDE_CODE[name] for name in ("model", "messages", "tools", "system")}
    assert client.post("/v1/messages/count_tokens?beta=true", json=counted).json()["input_tokens"] > 50


CALL = {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a"}'}}
CHATS: dict[str, dict[str, Any]] = {
    "cline": {
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": texts("hi", "<environment_details>")},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_details": []},
            {"role": "tool", "tool_call_id": "c1", "content": texts("data")},
        ],
        "parallel_tool_calls": False,
        "reasoning_effort": "medium",
        "reasoning": {"effort": "low"},
        "provider": {"sort": "price"},
    },
    "zed": {
        "messages": [
            {"role": "user", "content": texts("hi")},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**CALL, "function": {"name": "a", "arguments": ""}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "x"},
        ],
        "stop": [],
        "tool_choice": None,
        "parallel_tool_calls": None,
        "reasoning_effort": None,
    },
    "copilot": {
        "messages": [
            {"role": "user", "content": "hi", "name": "n", "copilot_cache_control": {"type": "ephemeral"}},
            {"role": "assistant", "content": "x", "padding": ""},
            {"role": "user", "content": texts("go")},
        ],
        "top_p": 1,
        "n": 1,
        "intent": True,
        "prediction": {"type": "content", "content": "x"},
        "logit_bias": {},
        "tools": [FUNCTION, {"type": "custom", "custom": {"name": "x"}}],
    },
    "open-webui": {
        "messages": [{"role": "user", "content": "hi"}],
        "metadata": {"user_id": "1"},
        "tool_ids": [],
        "files": [],
        "features": {},
        "session_id": "s",
        "chat_id": "c",
        "params": {},
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(client: httpx.Client, name: str) -> None:
    common = {"model": "smollm2", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    events = events_of(client, "/v1/chat/completions", {**common, "temperature": 0, "tools": [FUNCTION], **CHATS[name]})
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] <= 3
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]][-1] in ("length", "stop")


def test_tools_of_other_types_are_named(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "tools": [{"type": "web_search"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200 and response.headers["x-mnemos-ignored"] == "tool:web_search"


def test_the_allowed_tools_are_the_ones_that_may_be_called(client: httpx.Client) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": OBJECT}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "read_file"}}]}
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [other, FUNCTION],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
        "max_tokens": 30,
    }
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "read_file"


def test_home_assistant_and_zed_over_ollama(client: httpx.Client) -> None:
    body = {
        "model": "smollm2:latest",
        "messages": [
            {"role": "user", "content": "hi", "images": None},
            {
                "role": "assistant",
                "content": "",
                "thinking": None,
                "tool_calls": [{"function": {"name": "a", "arguments": {}}}],
            },
            {"role": "tool", "tool_name": "a", "content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": "a", "description": "", "parameters": None}}],
        "stream": True,
        "keep_alive": "-1s",
        "options": {"num_ctx": 2048, "num_predict": 3, "stop": [], "top_p": None},
        "think": False,
        "format": None,
    }
    response = client.post("/api/chat", json=body)
    assert response.status_code == 200 and '"done":true' in response.text.replace(" ", "")
