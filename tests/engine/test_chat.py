"""Conversations in Python: text, reasoning and tool calls apart, whole and as events."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.engine.answers import CallPiece, CallStart, End, Piece
from mnemos.engine.chat import config_for
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, RequestError, UnsupportedError
from mnemos.text.tools.exchange import Exchange
from tests.engine.toys import ToyModel

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Name three colours of the rainbow."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
THOUGHTFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, context_length=1024) as made:
        yield made


def test_an_answer_is_the_completion_of_the_rendered_conversation(engine: InferenceEngine) -> None:
    answer = engine.chat(QUESTION, max_new_tokens=40)
    assert engine.tokenizer is not None
    completion = engine.complete(engine.tokenizer.encode_chat(QUESTION), max_new_tokens=40)
    assert answer.text == completion.text and answer.finish_reason == completion.finish_reason
    assert answer.usage.completion_tokens == len(completion.token_ids) and not answer.calls and not answer.reasoning
    assert answer.message == {"role": "assistant", "content": answer.text}


def test_an_answer_may_fill_the_context_unless_a_length_is_given(engine: InferenceEngine) -> None:
    assert config_for(GenerationConfig(), Exchange([1]), 700).max_length == 700
    assert config_for(GenerationConfig(max_length=9), Exchange([1]), 700).max_length == 9
    assert engine.chat(QUESTION, {"max_new_tokens": 3}).finish_reason == "length"


def test_the_last_message_is_continued_if_it_is_the_assistants(engine: InferenceEngine) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The colours are red, orange and"}]
    assert "yellow" in engine.chat(begun, max_new_tokens=4).text
    closed = engine.submit_chat(begun, max_new_tokens=4, continue_final_message=False)
    assert closed.usage.prompt_tokens > engine.submit_chat(begun, max_new_tokens=4).usage.prompt_tokens


def test_a_forced_call_parses_and_its_message_continues_the_conversation(engine: InferenceEngine) -> None:
    answer = engine.chat(QUESTION, tools=[WEATHER], tool_choice="get_weather")
    (call,) = answer.calls
    assert call.name == "get_weather" and isinstance(call.parsed_arguments["city"], str)
    assert answer.finish_reason == "tool_calls" and not answer.text
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    further = engine.chat([*QUESTION, answer.message, result], tools=[WEATHER], max_new_tokens=4)
    assert further.usage.prompt_tokens > answer.usage.prompt_tokens


def test_events_add_up_to_the_answer(engine: InferenceEngine) -> None:
    events = list(engine.stream_chat(QUESTION, tools=[WEATHER], tool_choice="required"))
    whole = engine.chat(QUESTION, tools=[WEATHER], tool_choice="required")
    assert isinstance(events[0], CallStart) and events[0].name == "get_weather" and isinstance(events[-1], End)
    for index, call in enumerate(whole.calls):
        pieces = [event.text for event in events if isinstance(event, CallPiece) and event.index == index]
        assert "".join(pieces) == call.arguments


def test_reasoning_is_apart_and_within_its_budget(engine: InferenceEngine) -> None:
    options: dict[str, Any] = {
        "chat_template_kwargs": {"chat_template": THOUGHTFUL},
        "max_new_tokens": 20,
        "ignore_eos": True,
        "bad_words": ["<", "</"],  # the model writes no marks by itself
    }
    answer = engine.chat(QUESTION, thinking_token_budget=3, **options)
    assert answer.reasoning and answer.text and "think>" not in answer.reasoning + answer.text
    assert 0 < answer.answers[0].reasoning_tokens < 12
    assert answer.message["reasoning_content"] == answer.reasoning
    pieces = [event for event in engine.stream_chat(QUESTION, thinking_token_budget=3, **options)
              if isinstance(event, Piece)]  # fmt: skip
    for kind, text in (("reasoning", answer.reasoning), ("text", answer.text)):
        assert "".join(piece.text for piece in pieces if piece.kind == kind) == text
    plain = engine.chat(QUESTION, thinking=False, **options)
    limited = engine.chat(QUESTION, thinking=False, thinking_token_budget=3, **options)
    assert not plain.reasoning and limited.message == plain.message


def test_reasoning_that_begins_again_has_the_rest_of_the_budget(engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    script = engine.tokenizer.encode("one</think>Two<think>three four five", continues=True)

    def written(token_ids: Sequence[int], logits: Any) -> None:
        """Makes the model write the script, and then an A again and again."""
        at = len(token_ids) - len(prompt)
        logits[:] = -float("inf")
        logits[script[at] if at < len(script) else letter] = 0

    prompt = engine.tokenizer.encode_chat(QUESTION, chat_template=THOUGHTFUL)
    letter = engine.tokenizer.encode("A", continues=True)[-1]
    options: dict[str, Any] = {"chat_template_kwargs": {"chat_template": THOUGHTFUL}, "logits_processors": [written]}
    answer = engine.chat(QUESTION, thinking_token_budget=6, max_new_tokens=30, ignore_eos=True, **options)
    assert answer.reasoning.startswith("one") and "five" not in answer.reasoning and answer.text.endswith("AAA")


def test_several_answers_and_an_event_loop(engine: InferenceEngine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.9, "seed": 3, "n": 2}

    async def both() -> tuple[list[str], list[str]]:
        whole = await engine.submit_chat(QUESTION, **options)
        texts = ["", ""]
        async for event in engine.submit_chat(QUESTION, **options):
            if isinstance(event, Piece):
                texts[event.sequence] += event.text
        return [answer.text for answer in whole.answers], texts

    whole, streamed = asyncio.run(both())
    assert whole == streamed and whole[0] != whole[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [WEATHER], "tool_choice": "get_time"}, "tool_choice is 'get_time'; it must be none, auto, required"),
        ({"tool_choice": "required"}, r"or one of the tools \(there are none\)"),
        ({"tools": [WEATHER], "tool_choice": "required", "regex": "a"}, "tool_choice forces a call, and regex"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name is None"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages is set by the call's own"),
    ],
)
def test_what_is_wrong_is_named(engine: InferenceEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.chat(QUESTION, **options)


def test_messages_are_checked(engine: InferenceEngine) -> None:
    for messages, problem in (
        ("Hello", "messages is of type str"),
        ([], "messages is empty"),
        ([{}], r"messages\[0\]"),
    ):
        with pytest.raises(RequestError, match=problem):
            engine.chat(messages)
    with pytest.raises(ConfigError, match="temprature is not a field"):
        engine.chat(QUESTION, temprature=1)
    with InferenceEngine(ToyModel()) as toy, pytest.raises(UnsupportedError, match="the model has no tokenizer"):
        toy.chat(QUESTION)
