"""Tokens, templates and scores over HTTP are the engine's, in the forms that vLLM's and llama.cpp's clients expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.text.tokenizer import Tokenizer
from tests.engine.toys import ToyModel
from tests.serve.running import running
from tests.text.test_sentencepiece import train

TEXT = "The capital of France is Paris. 🦙"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say <|im_end|> or hi."}]
TOOL = {"type": "function", "function": {"name": "find_weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer(engine: InferenceEngine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_tokenize_answers_as_vllm_does(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = post(client, "/tokenize", {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True})
    expected = tokenizer.encode(TEXT, add_special=False)
    assert answer["tokens"] == expected and answer["count"] == len(expected) and answer["max_model_len"] == 2048
    assert answer["token_strs"][1] == " capital"
    assert post(client, "/tokenize", {"prompt": ""})["tokens"] == []


def test_tokenize_answers_as_llama_cpp_does(client: httpx.Client, tokenizer: Tokenizer) -> None:
    assert post(client, "/tokenize", {"content": TEXT}) == {"tokens": tokenizer.encode(TEXT, add_special=False)}
    pieces = post(client, "/tokenize", {"content": TEXT, "with_pieces": True})["tokens"]
    raw = b"".join(one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces)
    assert raw.decode() == TEXT
    assert any(isinstance(one["piece"], list) for one in pieces)  # parts of the last character
    plain = post(client, "/tokenize", {"content": "<|im_end|>", "parse_special": False})["tokens"]
    assert len(plain) > 1 and len(post(client, "/tokenize", {"content": "<|im_end|>"})["tokens"]) == 1


def test_detokenize_returns_the_text_with_special_tokens(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = f"<|im_start|>user\n{TEXT}<|im_end|>"
    assert post(client, "/detokenize", {"tokens": tokenizer.encode(text)}) == {"prompt": text, "content": text}


def test_a_conversation_is_tokenized_as_chat_reads_it(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 1, "return_token_ids": True}
    read = post(client, "/v1/chat/completions", body)["prompt_token_ids"]
    assert post(client, "/tokenize", {"messages": MESSAGES, "tools": [TOOL]})["tokens"] == read


@pytest.mark.parametrize("last", ["user", "assistant"])
def test_an_applied_template_can_be_sent_as_a_prompt(client: httpx.Client, last: str) -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": last, "content": "Then"}]
    prompt = post(client, "/apply-template", {"messages": messages})["prompt"]
    assert prompt.endswith("Then" if last == "assistant" else "<|im_start|>assistant\n")
    assert (
        post(client, "/tokenize", {"prompt": prompt})["tokens"]
        == (post(client, "/tokenize", {"messages": messages})["tokens"])
    )


def test_an_applied_template_leaves_out_what_encoding_adds(tmp_path: Path) -> None:
    """A SentencePiece model adds a begin token and spaces, which must not be in the text as well."""
    size = train(tmp_path).vocab_size()
    added = {"2": {"content": "</s>", "special": True}, str(size): {"content": "<|im_start|>", "special": True}}
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    config = {"chat_template": template, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.model")
    messages = [{"role": "user", "content": "a b"}]
    with InferenceEngine(ToyModel(), tokenizer) as engine, running(app(engine)) as client:
        prompt = post(client, "/apply-template", {"messages": messages})["prompt"]
        assert prompt == "<|im_start|>a b"
        assert post(client, "/tokenize", {"prompt": prompt}) == post(client, "/tokenize", {"messages": messages})


def test_an_applied_template_names_the_tools(client: httpx.Client) -> None:
    assert "find_weather" in post(client, "/apply-template", {"messages": MESSAGES, "tools": [TOOL]})["prompt"]


def test_scores_are_the_engines(client: httpx.Client, engine: InferenceEngine) -> None:
    texts = [TEXT, "Paris France of is the"]
    answer = post(client, "/score", {"texts": texts})
    for shown, own in zip(answer["scores"], engine.score(texts), strict=True):
        assert shown["tokens"] == own.token_ids and shown["token_logprobs"][0] is None
        np.testing.assert_allclose(shown["token_logprobs"][1:], own.logprobs, atol=1e-4)
        assert shown["log_likelihood"] == pytest.approx(own.logprobs.sum(), abs=1e-3)
    assert answer["usage"]["prompt_tokens"] == sum(len(one["tokens"]) for one in answer["scores"])
    alone = post(client, "/score", {"text": answer["scores"][0]["tokens"]})
    assert alone["scores"] == answer["scores"][:1]


def test_tokenizer_info_is_what_a_remote_tokenizer_needs(client: httpx.Client, tokenizer: Tokenizer) -> None:
    info = client.get("/tokenizer_info").json()
    assert post(client, "/tokenize", {"prompt": info["eos_token"]})["tokens"] == [tokenizer.eos_id]
    assert info["chat_template"] == tokenizer.chat_template and info["model_max_length"] == 2048


def test_a_harness_scores_continuations_as_the_engine_does(client: httpx.Client, engine: InferenceEngine) -> None:
    """The requests of lm-evaluation-harness: tokens from /tokenize, then their echo and one token more."""
    start, end = (
        post(client, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        for text in ("The capital of France is", " Paris, of course")
    )
    body = {"prompt": [start + end], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    logprobs = post(client, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    own = engine.score([start + end])[0].logprobs[-len(end) :]
    np.testing.assert_allclose(logprobs[len(start) : -1], own, atol=1e-4)


def test_props_name_context_and_template(client: httpx.Client, engine: InferenceEngine, tokenizer: Tokenizer) -> None:
    props = client.get("/props", params={"model": "smollm2"}).json()
    assert props["default_generation_settings"]["n_ctx"] == 2048
    assert props["total_slots"] == engine.max_sequences
    assert props["model_path"] == "smollm2" and props["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("/tokenize", {"prompt": "a", "add_special_token": True}, "add_special_token"),
        ("/tokenize", {"messages": [{"content": "a"}]}, "messages"),
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": MESSAGES, "chat_template": "{{ messages }}"}, "chat_template"),
        ("/apply-template", {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
         "chat_template_kwargs.messages"),
        ("/score", {}, "text"),
        ("/score", {"texts": ["a", 3]}, "texts[1]"),
        ("/score", {"texts": ["of the", "a"]}, "texts[1]"),
        ("/score", {"text": "a"}, "text"),
        ("/score", {"text": "a", "texts": ["a"]}, "texts"),
        ("/score", {"text_1": "a", "text_2": "b"}, "text_1"),
        ("/score", {"text": "word " * 3000}, "text"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_names_the_field(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
