"""Tool calls and reasoning are read as each family writes them, in whatever pieces they arrive."""

# ruff: noqa: RUF001  DeepSeek's marks have wide bars

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest

from mnemos.text.tools.budget import ReasoningBudget
from mnemos.text.tools.exchange import functions_of, spelled_out
from mnemos.text.tools.families import FAMILIES, HERMES, THINKING, Thinking, family_of
from mnemos.text.tools.forcing import forced_calls
from mnemos.text.tools.fragments import CallName, Reasoning, Text
from mnemos.text.tools.reader import AnswerReader
from mnemos.text.tools.schemas import closed

BY_NAME = {family.name: family for family in FAMILIES}
ARGUMENTS = {"city": 'Paris "x" }', "days": 3}
JSON = json.dumps(ARGUMENTS)
SCHEMAS = {"get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
NAMED = f'{{"name": "get_weather", "arguments": {JSON}}}'
PARAMETERS = f'{{"name": "get_weather", "parameters": {JSON}}}'
TAGS = '<parameter=city>\nParis "x" }\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>'

# Two calls in the form of each family.
WRITTEN = {
    "hermes": f"<tool_call>\n{NAMED}\n</tool_call>\n<tool_call>\n"
    + f'{{"arguments": {JSON}, "name": "get_weather"}}\n</tool_call>',
    "deepseek": "<｜tool▁calls▁begin｜>"
    + f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{JSON}\n```<｜tool▁call▁end｜>\n" * 2
    + "<｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜>"
    + f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>" * 2
    + "<｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|>"
    + f"<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{JSON}<|tool_call_end|>" * 2
    + "<|tool_calls_section_end|>",
    "minimax": "<minimax:tool_call>\n"
    + '<invoke name="get_weather">\n<parameter name="city">Paris "x" }</parameter>\n'
    + '<parameter name="days">3</parameter>\n</invoke>\n'
    + '<invoke name="get_weather">\n<parameter name="city">Paris "x" }</parameter>\n'
    + '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
    "glm": (
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris "x" }</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
    )
    * 2,
    "qwen3-coder": f"<tool_call>\n<function=get_weather>\n{TAGS}\n</tool_call>\n" * 2,
    "tagged": f"<function=get_weather>\n{TAGS}\n" * 2,
    "gemma": '<start_function_call>call:get_weather{city:<escape>Paris "x" }<escape>,days:3}<end_function_call>' * 2,
    "gemma-4": '<|tool_call>call:get_weather{city:<|"|>Paris "x" }<|"|>,days:3}<tool_call|>' * 2,
    "mistral": f"[TOOL_CALLS][{NAMED}, {NAMED}]",
    "mistral-args": f"[TOOL_CALLS]get_weather[ARGS]{JSON}" * 2,
    "phi": f"<|tool_call|>[{NAMED}, {NAMED}]<|/tool_call|>",
    "granite": f"<|tool_call|>[{NAMED}, {NAMED}]",
    "nemotron": f"<TOOLCALL>[{NAMED}, {NAMED}]</TOOLCALL>",
    "command": f'<|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {JSON}}},\n'
    + f'{{"tool_call_id": "1", "tool_name": "get_weather", "parameters": {JSON}}}\n]<|END_ACTION|>',
    "internlm": f"<|action_start|><|plugin|>{PARAMETERS}<|action_end|>" * 2,
    "llama-3": f"<|python_tag|>{PARAMETERS}; {PARAMETERS}",
    "llama-3-json": f"{PARAMETERS}; {PARAMETERS}",
    "pythonic": "[get_weather(city='Paris \"x\" }', days=3), get_weather(city='Paris \"x\" }', days=3)]",
}


def read(reader: AnswerReader, text: str, size: int) -> tuple[str, str, list[list[str]]]:
    """(text, reasoning, calls) of an answer that arrives in pieces of up to `size` characters."""
    rng, at, fragments = random.Random(size), 0, []
    while at < len(text):
        step = rng.randint(1, size)
        fragments += reader.push(text[at : at + step])
        at += step
    fragments += reader.finish()
    answer, reasoning, calls = "", "", []
    for fragment in fragments:
        match fragment:
            case Text(piece):
                answer += piece
            case Reasoning(piece):
                reasoning += piece
            case CallName(name):
                calls.append([name, ""])
            case _:
                calls[-1][1] += fragment.text
    return answer, reasoning, calls


def test_every_family_has_an_example() -> None:
    assert WRITTEN.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_calls_are_read_in_pieces_of_any_size(name: str, size: int) -> None:
    family = BY_NAME[name]
    for before in ("", "I look.\n") if not family.opens else ("",):
        reader = AnswerReader(family, None, SCHEMAS)
        text, _, calls = read(reader, before + WRITTEN[name], size)
        assert text == before.rstrip() and not reader.open
        assert [(called, json.loads(arguments)) for called, arguments in calls] == [("get_weather", ARGUMENTS)] * 2


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_text_and_calls_are_told_apart(size: int) -> None:
    answer = f"<think>\na < b\n</think>\n\nHello  there\n<tool_call>\n{NAMED}\n</tool_call>"
    text, reasoning, calls = read(AnswerReader(HERMES, THINKING[0], SCHEMAS), answer, size)
    assert (text, reasoning, len(calls)) == ("Hello  there", "a < b", 1)
    opened = AnswerReader(None, THINKING[0], {}, inside=True)
    assert read(opened, "so\n</think>\n\nYes", size) == ("Yes", "so", [])


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("family", "answer"),
    [
        (HERMES, "a <tool_call> no </tool_call> b"),
        (HERMES, "if a <tool and b"),
        (HERMES, "trailing space \n"),
        (BY_NAME["llama-3"], '{"a": 5} is JSON'),
        (BY_NAME["pythonic"], "[1, 2] is a list"),
        (BY_NAME["mistral"], "[TOOL_CALLS] is a mark"),
    ],
)
def test_what_is_no_call_stays_text(family: Any, answer: str, size: int) -> None:
    text, _, calls = read(AnswerReader(family, None, {}), answer, size)
    assert (text, calls) == (answer, [])


def test_a_call_that_was_cut_off_is_open() -> None:
    reader = AnswerReader(HERMES, None, {})
    assert read(reader, '<tool_call>\n{"name": "f", "arguments": {"a": 1', 5)[2] == [["f", '{"a": 1']]
    assert reader.open


def test_python_is_parsed_and_never_run() -> None:
    text, _, calls = read(AnswerReader(BY_NAME["pythonic"], None, {}), "[f(a=__import__('os').getpid())]", 100)
    assert not calls and "getpid" in text


@pytest.mark.parametrize("name", ["hermes", "kimi", "mistral-args", "deepseek", "qwen3-coder", "llama-3", "pythonic"])
def test_endless_nonsense_takes_linear_time(name: str) -> None:
    family = BY_NAME[name]
    seconds = []
    for length in (5_000, 40_000):
        reader, piece = AnswerReader(family, None, {}), '{"x":"'
        start = time.process_time()
        for text in [family.start or family.opens[0], *[piece] * length]:
            reader.push(text)
        reader.finish()
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * seconds[0] + 1  # 8 times as long; quadratic would be 64


@pytest.mark.parametrize("template", ["{{ tools }}<tool_call>", "{{ tools }}[TOOL_CALLS] [ARGS]", "no mention"])
def test_the_family_is_found_in_the_template(template: str) -> None:
    family = family_of(template)
    expected = {"{{ tools }}<tool_call>": "hermes", "{{ tools }}[TOOL_CALLS] [ARGS]": "mistral-args"}.get(template)
    assert (family.name if family else None) == expected


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.as_json])
@pytest.mark.parametrize("thinks", [False, True])
def test_a_forced_call_is_one_that_is_read(name: str, thinks: bool) -> None:
    guidance = pytest.importorskip("llguidance")
    family, thinking = BY_NAME[name], THINKING[0] if thinks else None
    tools = [{"name": "f"}, {"name": "get_weather", "parameters": SCHEMAS["get_weather"]}]
    lark = forced_calls(family, tools, single=True, specials=lambda text: [], thinking=thinking)
    tokenizer = guidance.LLTokenizer("byte")
    matcher = guidance.LLMatcher(tokenizer, guidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    key, arguments = family.as_json or ("", "")
    body = f'{{"{key}": "get_weather", "{arguments}": {JSON}}}'
    body = f"[{body}]" if family.listed else body if not family.end else f"\n{body}\n"
    answer = (
        ("why not</think>" if thinks else "")
        + (family.start if family.end or family.listed else "")
        + body
        + family.end
    )
    assert matcher.try_consume_tokens(tokenizer.tokenize_str(answer)) == len(answer.encode())
    assert matcher.is_accepting()
    reader = AnswerReader(family, thinking, SCHEMAS, inside=thinks)
    assert [name for name, _ in read(reader, answer, 7)[2]] == ["get_weather"]


def test_a_template_without_tools_gets_them_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    system, called, result = spelled_out(messages, functions_of([{"type": "function", "function": {"name": "f"}}]))
    assert system["content"].startswith("Be brief.") and '"name": "f"' in system["content"]
    assert called["content"] == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert result == {"role": "user", "content": "<tool_response>\ndone\n</tool_response>"}


class Letters:
    """A tokenizer of one token a character, the letter's code."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("inside", "answer", "forced"),
    [
        (True, "", ""),
        (True, "ab", ""),
        (True, "abc", "<"),
        (True, "abc</thi", "n"),
        (True, "ab</t", "h"),  # as it began by itself
        (True, "abc</think>", ""),
        (True, "abc</think>more words", ""),
        (True, "a</think>", ""),
        (True, "a</think>text <think>", "<"),  # reasoning that begins again has what is left: nothing
        (True, "a</think>text <think></think>", ""),
        (False, "words without reasoning", ""),
        (False, "<think>ab", ""),
        (False, "<think>abc", "<"),
    ],
)
def test_reasoning_ends_with_its_budget(inside: bool, answer: str, forced: str) -> None:
    tokenizer: Any = Letters()
    prompt = tokenizer.encode("Why?")
    whole = ReasoningBudget(3, Thinking("<think>", "</think>"), tokenizer, inside=inside)
    for length in range(len(answer) + 1):
        logits = np.zeros(128, np.float32)
        whole([*prompt, *tokenizer.encode(answer[:length])], logits)
    allowed = np.flatnonzero(np.isfinite(logits))
    assert [chr(token) for token in allowed] == list(forced) or (not forced and len(allowed) == 128)
    whole([*prompt, ord("x")], logits := np.zeros(128, np.float32))  # another sequence of the same request
    assert np.isfinite(logits).all()


def test_objects_of_a_closed_schema_have_the_listed_properties_only() -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}}}
    shut = {**point, "additionalProperties": False}
    nested = {
        "type": "object",
        "properties": {"at": point, "all": {"type": "array", "items": point}},
        "$defs": {"p": point},
    }
    assert closed(nested) == {
        "type": "object",
        "properties": {"at": shut, "all": {"type": "array", "items": shut}},
        "$defs": {"p": shut},
        "additionalProperties": False,
    }
    assert closed({"anyOf": [point, {"type": "null"}]}) == {"anyOf": [shut, {"type": "null"}]}
    for schema in (
        {**point, "additionalProperties": {"type": "string"}},
        {**point, "patternProperties": {"^y": {}}},
        {"allOf": [point, {"properties": {"y": {}}}]},
        {**point, "allOf": [{"properties": {"y": {}}}]},
        {"type": "object"},
        {"enum": [{"properties": {}}]},
        True,
    ):
        assert closed(schema) == schema
