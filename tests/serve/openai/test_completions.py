"""Plain completions: prompts in every form, echo, log probabilities in OpenAI's older form, streams of several."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.text.tokenizer import Tokenizer
from tests.serve.running import events_of

PATH = "/v1/completions"
PROMPT = "The capital of France is"


@pytest.fixture
def tokenizer(engine: InferenceEngine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_prompts_of_every_form_are_answered_in_order(
    client: httpx.Client, engine: InferenceEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("Water is")
    answer = ask(client, prompt=[PROMPT, ids], n=1)
    own = [engine.complete(prompt, max_new_tokens=6) for prompt in (tokenizer.encode(PROMPT), ids)]
    assert answer["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (index, completion.text) for index, completion in enumerate(own)
    ]
    assert answer["usage"]["prompt_tokens"] == sum(completion.usage.prompt_tokens for completion in own)
    assert answer["usage"]["completion_tokens"] == 12
    assert ask(client, prompt=ids)["choices"][0]["text"] == own[1].text


def test_nothing_is_generated_beyond_sixteen_tokens_by_default(client: httpx.Client) -> None:
    assert client.post(PATH, json={"prompt": "1 2 3 4", "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_of_token_ids_is_scored_as_evaluation_harnesses_do(
    client: httpx.Client, engine: InferenceEngine, tokenizer: Tokenizer, most: int
) -> None:
    ids = tokenizer.encode(PROMPT + " Paris")
    choice = ask(client, prompt=[ids], echo=True, logprobs=1, max_tokens=most, seed=1234)["choices"][0]
    logprobs = choice["logprobs"]
    logits = engine.logits(ids).astype(np.float64)
    logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1, keepdims=True)
    expected = logits[np.arange(len(ids) - 1), ids[1:]]
    assert len(logprobs["token_logprobs"]) == len(ids) + most
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1 : len(ids)], expected, atol=1e-4)
    for own, top, row in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], logits, strict=False):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-4) and own in top.values()
    assert "".join(logprobs["tokens"]) == choice["text"]
    places = np.cumsum([0, *(len(token) for token in logprobs["tokens"])])[:-1]
    assert logprobs["text_offset"] == places.tolist()


def test_an_echo_is_the_text_that_was_sent(client: httpx.Client) -> None:
    special = "<|im_start|>user\nhi"
    assert ask(client, prompt=special, echo=True, max_tokens=1)["choices"][0]["text"].startswith(special)
    assert ask(client, echo=True, max_tokens=0)["choices"][0] == {
        "index": 0, "text": PROMPT, "logprobs": None, "finish_reason": "length", "stop_reason": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True, "logprobs": 2},
        {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 0},
        {"n": 1, "best_of": 3, "temperature": 1.0, "seed": 3},
        {"stop": [" of", "\n"], "max_tokens": 20, "echo": True},
        {"return_token_ids": True},
    ],
)
def test_a_stream_of_several_prompts_adds_up_to_the_whole_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    request = {"prompt": [PROMPT, "Two and two"], **fields}
    whole = ask(client, **request)
    chunks = events_of(
        client,
        PATH,
        {"max_tokens": 6, "temperature": 0, **request, "stream": True, "stream_options": {"include_usage": True}},
    )
    *chunks, last, done = chunks
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [choice["index"] for choice in whole["choices"]] == list(range(2 * fields.get("n", 1)))
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [value for c in own if c["logprobs"] for value in c["logprobs"][name]] == values
        if "token_ids" in choice:
            assert [token for c in own for token in c.get("token_ids", ())] == choice["token_ids"]
            assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]


def test_several_results_without_a_temperature_are_sampled(client: httpx.Client) -> None:
    response = client.post(PATH, json={"prompt": PROMPT, "max_tokens": 8, "n": 3, "seed": 1})
    assert len({choice["text"] for choice in response.json()["choices"]}) > 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "not empty"),
        ({"prompt": []}, "prompt", "text, token ids"),
        ({"prompt": [[]]}, "prompt[0]", "not empty"),
        ({"prompt": {"a": 1}}, "prompt", "text, token ids"),
        ({"prompt": [1, "a"]}, "prompt[0]", "text or token ids"),
        ({"prompt": [10**6]}, "prompt", "vocabulary"),
        ({"prompt": [-1]}, "prompt[0]", "token ids"),
        ({"prompt": ["a"] * 200}, "prompt", "at most 128"),
        ({"prompt": "word " * 3000}, "prompt", "maximum context length"),
        ({"suffix": "end"}, "suffix", "not trained"),
        ({"n": 17, "temperature": 1}, "n", "at most 16"),
        ({"best_of": 2, "n": 3, "temperature": 1}, "best_of", "at least"),
        ({"logprobs": 101}, "logprobs", "100"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100"),
        ({"stop": ["x"] * 300}, "stop", "256"),
        ({"stop_token_ids": [10**7]}, "stop_token_ids", "vocabulary"),
        ({"guided_regex": "(", "max_tokens": 5}, "guided_regex", "regex"),
        ({"guided_regex": "a", "regex": "b"}, "guided_regex", "both"),
        ({"structured_outputs": {}}, "structured_outputs", "json"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens"),
        ({"top_logprobs": 5}, "top_logprobs", "logprobs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "model's own"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.post(PATH, json={"prompt": PROMPT, "max_tokens": 4, **fields, "stream": True})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["Rome", "Oslo"]}, "Rome|Oslo"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"structured_outputs": {"regex": "[0-9]{2}"}}, "[0-9]{2}"),
        ({"structured_outputs": {"json": {"type": "integer"}}, "max_tokens": 40}, "-?[0-9]+"),
    ],
)
def test_the_names_of_other_servers_are_understood(client: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    import re

    answer = ask(client, **fields)
    assert re.fullmatch(pattern, answer["choices"][0]["text"].strip()), answer


@pytest.mark.slow
def test_a_prompt_is_cut_to_its_last_tokens(client: httpx.Client, tokenizer: Tokenizer) -> None:
    cut = ask(client, truncate_prompt_tokens=3, return_token_ids=True)
    assert cut["choices"][0]["prompt_token_ids"] == tokenizer.encode(PROMPT)[-3:] and cut["usage"]["prompt_tokens"] == 3
    assert ask(client, prompt="word " * 3000, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2048 - 6


def test_beams_by_the_name_of_vllm(client: httpx.Client, engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    answer = ask(client, use_beam_search=True, n=3)
    own = engine.complete(tokenizer.encode(PROMPT), num_beams=3, n=3, max_new_tokens=6)
    assert [choice["text"] for choice in answer["choices"]] == [choice.text for choice in own.choices]


def test_the_prompt_is_scored_on_request(client: httpx.Client, tokenizer: Tokenizer) -> None:
    scores = ask(client, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    ids = tokenizer.encode(PROMPT)
    assert scores[0] is None and len(scores) == len(ids)
    for token, row in zip(ids[1:], scores[1:], strict=True):
        assert str(token) in row and any(one["rank"] == 1 for one in row.values())


@pytest.mark.slow
def test_numbers_of_any_size_are_refused_or_answered(client: httpx.Client) -> None:
    for value in (-1, 2**31, 2**64, True, [1], "1", 1.5):
        for name in ("n", "best_of", "max_tokens", "top_k", "logprobs", "prompt_logprobs", "priority", "min_tokens"):
            body = json.dumps({"prompt": "a", "max_tokens": 1, name: value})
            response = client.post(PATH, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400 or (name, value) in ALLOWED, (name, value, response.text)
            assert response.elapsed.total_seconds() < 20


ALLOWED = [("priority", -1), ("top_k", -1), ("prompt_logprobs", True), ("top_k", 2**31)]


def test_chunks_of_text_alone_have_the_fields_of_all_chunks(client: httpx.Client) -> None:
    request = {"prompt": [PROMPT, "Water is"], "max_tokens": 8, "stream": True, "temperature": 0, "echo": True}
    plain = events_of(client, PATH, request)[:-1]
    more = events_of(client, PATH, {**request, "stream_options": {"continuous_usage_stats": True}})[:-1]

    def seen(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        own = [{**chunk, "id": "", "created": 0} for chunk in chunks]
        for chunk in own:
            chunk.pop("usage", None)
        return sorted(own, key=lambda chunk: int(chunk["choices"][0]["index"]))  # prompts' chunks arrive in any order

    assert seen(plain) == seen(more)
    assert "".join(chunk["choices"][0]["text"] for chunk in seen(plain)).startswith(PROMPT)
