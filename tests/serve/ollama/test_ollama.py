"""Ollama's API, as its own client and the editors that look for it use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import ollama
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.catalogue import FOREVER
from mnemos.serve.ollama.types import seconds_of
from mnemos.serve.refusal import Refusal

ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
LIMIT: Any = {"num_predict": 12}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def sdk(client: httpx.Client) -> Iterator[ollama.Client]:
    yield ollama.Client(host=str(client.base_url))


def test_a_chat_is_answered_whole_and_in_pieces_alike(sdk: ollama.Client) -> None:
    whole = sdk.chat(model="smollm2", messages=ASKED, options=LIMIT)
    pieces = list(sdk.chat(model="smollm2:latest", messages=ASKED, options=LIMIT, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]
    assert last.eval_count == whole.eval_count and last.prompt_eval_count == whole.prompt_eval_count
    assert last.done_reason == whole.done_reason and (last.total_duration or 0) > (last.eval_duration or 0) > 0


def test_a_prompt_is_continued_raw_or_as_a_conversation(sdk: ollama.Client) -> None:
    spoken = sdk.generate(model="smollm2", prompt=ASKED[0]["content"], options=LIMIT)
    assert spoken.response == sdk.chat(model="smollm2", messages=ASKED, options=LIMIT).message.content
    raw = sdk.generate(model="smollm2", prompt="One, two, three,", raw=True, options=LIMIT)
    assert "four" in raw.response


def test_json_follows_its_schema(sdk: ollama.Client) -> None:
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    answer = sdk.chat(model="smollm2", messages=ASKED, format=schema, options={"num_predict": 60})
    assert set(json.loads(answer.message.content or "")) == {"n"}


def test_embeddings_are_the_engines(sdk: ollama.Client, engine: InferenceEngine) -> None:
    found = sdk.embed(model="smollm2", input=["a cat", "a dog"])
    assert np.allclose(found.embeddings, engine.embed(["a cat", "a dog"]), atol=1e-6)
    assert np.allclose(sdk.embeddings(model="smollm2", prompt="a cat").embedding, found.embeddings[0])


def test_what_editors_look_for_is_there(sdk: ollama.Client, client: httpx.Client) -> None:
    major, minor, patch = map(int, client.get("/api/version").json()["version"].split("."))
    assert (major, minor, patch) >= (0, 6, 4)
    (listed,) = sdk.list().models
    assert listed.model == "smollm2:latest"
    shown = sdk.show("smollm2:latest")
    assert shown.capabilities is not None and {"completion", "tools"} <= set(shown.capabilities)
    info = shown.modelinfo or {}
    assert info[f"{info['general.architecture']}.context_length"] == 2048 and info["general.basename"]
    assert client.post("/api/show", json={"name": "smollm2"}).status_code == 200
    assert sdk.ps().models[0].model == "smollm2:latest"


def test_a_model_can_be_loaded_ahead(sdk: ollama.Client) -> None:
    assert sdk.chat(model="smollm2", messages=[]).done_reason == "load"


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(None, None), (0, 0), ("0", 0), ("5m", 300), ("1h30m", 5400), (-1, FOREVER), ("-1", FOREVER), ("-5m", FOREVER)],
)
def test_times_are_read_as_ollama_reads_them(keep_alive: Any, seconds: float | None) -> None:
    assert seconds_of(keep_alive) == seconds


@pytest.mark.parametrize("keep_alive", ["soon", "5 m", "5mx", "1e400"])
def test_other_times_are_refused(keep_alive: str) -> None:
    with pytest.raises(Refusal, match="keep_alive"):
        seconds_of(keep_alive)


def test_tools_and_results_are_taken(sdk: ollama.Client) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "Sunny"},
    ]
    answer = sdk.chat(model="smollm2", messages=messages, tools=[WEATHER], options=LIMIT)
    assert (answer.prompt_eval_count or 0) > 100


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "none", "messages": ASKED}, 404, "does not exist"),
        ("/api/chat", {"messages": ASKED, "options": {"temprature": 1}}, 400, "options.temprature"),
        ("/api/chat", {"messages": ASKED, "options": {"temperature": -1}}, 400, "options.temperature"),
        ("/api/chat", {"messages": ASKED, "format": "xml"}, 400, "format"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "text only"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/api/pull", {"model": "x"}, 403, "starts"),
    ],
)
def test_errors_have_the_protocols_form(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status and set(response.json()) == {"error"}
    assert words in response.json()["error"]
