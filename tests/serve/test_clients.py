"""Clients that many programs are built on work as they are. Each test needs its package and is left out without it."""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine

pytestmark = pytest.mark.slow
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look at a list on the network
os.environ.setdefault("LANGSMITH_TRACING", "false")

QUESTION = "Where is the Eiffel Tower?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": PARAMETERS}}


@pytest.fixture
def address(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


@pytest.mark.parametrize("protocol", ["openai", "hosted_vllm", "anthropic", "ollama_chat"])
def test_litellm(address: str, protocol: str) -> None:
    litellm = pytest.importorskip("litellm")
    base = address if protocol in ("anthropic", "ollama_chat") else f"{address}/v1"
    common = {"model": f"{protocol}/smollm2", "api_base": base, "api_key": "any", "messages": MESSAGES}
    whole = litellm.completion(**common, max_tokens=8)
    text = whole.choices[0].message.content
    pieces = litellm.completion(**common, max_tokens=8, stream=True)
    assert text and "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
    if protocol != "ollama_chat":  # whose protocol forces no calls
        forced = {"tools": [TOOL], "tool_choice": "required"}
        called = litellm.completion(**common, max_tokens=60, **forced)
        assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
        assert called.choices[0].finish_reason == "tool_calls"
    if protocol == "openai":
        long = [{"role": "user", "content": "word " * 4000}]
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**{**common, "messages": long})
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**{**common, "model": "openai/other"})


@pytest.mark.parametrize("package", ["langchain_openai", "langchain_anthropic", "langchain_ollama"])
def test_langchain(address: str, package: str) -> None:
    module = pytest.importorskip(package)
    if package == "langchain_ollama":
        model = module.ChatOllama(model="smollm2", base_url=address, num_predict=60, validate_model_on_init=True)
    else:
        name, base = ("ChatOpenAI", f"{address}/v1") if package == "langchain_openai" else ("ChatAnthropic", address)
        model = getattr(module, name)(model="smollm2", base_url=base, api_key="any", max_tokens=60)
    whole = model.invoke(QUESTION).text
    assert whole and "".join(piece.text for piece in model.stream(QUESTION)) == whole
    closed = {**PARAMETERS, "title": "Place", "additionalProperties": False}
    place = model.with_structured_output(closed, method="json_schema").invoke(QUESTION)
    assert isinstance(place, dict) and isinstance(place["city"], str)
    if package != "langchain_ollama":
        (call, *_) = model.bind_tools([TOOL], tool_choice="any").invoke(QUESTION).tool_calls
        assert call["name"] == "get_weather" and isinstance(call["args"]["city"], str)


def test_llm(address: str) -> None:
    models = pytest.importorskip("llm.default_plugins.openai_models")
    chat = models.Chat("ours", model_name="smollm2", api_base=f"{address}/v1", supports_schema=True)
    answer = chat.prompt(QUESTION, stream=True, key="any", max_tokens=8)
    assert answer.text() and answer.usage().output == 8
    assert answer.text() == chat.prompt(QUESTION, stream=False, key="any", max_tokens=8).text()


def test_lm_evaluation_harness(address: str, engine: InferenceEngine) -> None:
    module = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    url = f"{address}/v1/completions"
    harness = module.LocalCompletionsAPI(model="smollm2", base_url=url, tokenizer_backend="remote", max_retries=1)
    context, continuation = "The capital of France is", " Paris"
    request = instance("loglikelihood", {}, (context, continuation), 0)
    ((likelihood, greedy),) = harness.loglikelihood([request], disable_tqdm=True)
    assert engine.tokenizer is not None
    whole = engine.score(engine.tokenizer.encode(context + continuation))[0]
    count = len(engine.tokenizer.encode(continuation, continues=True))
    assert likelihood == pytest.approx(sum(whole.logprobs[-count:]), abs=1e-4) and isinstance(greedy, bool)
    until = instance("generate_until", {}, (context, {"until": ["\n"], "max_gen_toks": 4}), 0)
    (text,) = harness.generate_until([until], disable_tqdm=True)
    assert text == engine.generate(context, max_new_tokens=4, stop=["\n"])
