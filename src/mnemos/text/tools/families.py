"""How families of models write tool calls and reasoning, and how a family is recognised by its chat template.

The forms are those of the models' own templates and of the parsers in vLLM and llama.cpp.
"""

# ruff: noqa: RUF001  DeepSeek's marks have wide bars

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mnemos.text.tools.forms import (
    CallReader,
    JsonCalls,
    NamedJson,
    Schemas,
    WholeCalls,
    braced_call,
    python_calls,
    tagged_call,
)


@dataclass(frozen=True)
class Family:
    """One way of writing tool calls.

    template  texts that a chat template of this family contains, all of them
    start     the mark before a call; empty: calls are the whole answer and begin with one of `opens`
    end       the mark after it; empty: the call ends with the text
    reader    makes a reader of what is between the marks
    opens     how an answer that is a call begins, where there is no mark
    around    marks around several calls, which mean nothing by themselves
    as_json   calls are JSON objects with a name and arguments, so that they can be forced by a grammar: the keys
    listed    the calls between the marks are a JSON list
    short_ids call ids are nine letters and digits
    """

    name: str
    template: tuple[str, ...]
    start: str
    end: str
    reader: Callable[[Schemas], CallReader]
    opens: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    as_json: tuple[str, str] | None = None
    listed: bool = False
    short_ids: bool = False


def _json(schemas: Schemas) -> CallReader:
    return JsonCalls()


def _tagged(name: str, pair: str) -> Callable[[Schemas], CallReader]:
    return lambda schemas: WholeCalls(lambda text: tagged_call(text, schemas, name, pair))


def _braced(escape: str) -> Callable[[Schemas], CallReader]:
    return lambda schemas: WholeCalls(lambda text: braced_call(text, escape))


_NAME_TAG = r"<function=([^>]*)>"
_PAIR_TAG = r"<parameter=([^>]*)>(.*?)</parameter>"

HERMES = Family("hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", _json, as_json=("name", "arguments"))

# The first family whose marks are all in the template is the model's.
FAMILIES = (
    Family(
        "deepseek",
        ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "```json"),
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        lambda schemas: NamedJson("\n", prefix="function<｜tool▁sep｜>"),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    Family(
        "deepseek-v3.1",
        ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        lambda schemas: NamedJson("<｜tool▁sep｜>"),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    Family(
        "kimi",
        ("<|tool_call_argument_begin|>",),
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        lambda schemas: NamedJson("<|tool_call_argument_begin|>", prefix="functions."),
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    Family(
        "minimax",
        ("<minimax:tool_call>",),
        "<invoke",
        "</invoke>",
        _tagged(r'name="([^"]*)">', r'<parameter name="([^"]*)">(.*?)</parameter>'),
        around=("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
    Family(
        "glm",
        ("<arg_key>", "<arg_value>"),
        "<tool_call>",
        "</tool_call>",
        _tagged(r"^\s*([^\s<]+)", r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"),
    ),
    Family(
        "qwen3-coder",
        ("<function=", "<parameter=", "<tool_call>"),
        "<tool_call>",
        "</tool_call>",
        _tagged(_NAME_TAG, _PAIR_TAG),
    ),
    Family(
        "tagged",
        ("<function=", "<parameter="),
        "<function=",
        "</function>",
        _tagged(r"^([^>]*)>", _PAIR_TAG),
    ),
    Family(
        "gemma",
        ("<start_function_call>",),
        "<start_function_call>",
        "<end_function_call>",
        _braced("<escape>"),
    ),
    Family("gemma-4", ("<|tool_call>",), "<|tool_call>", "<tool_call|>", _braced('<|"|>')),
    Family(
        "mistral-args",
        ("[TOOL_CALLS]", "[ARGS]"),
        "[TOOL_CALLS]",
        "",
        lambda schemas: NamedJson("[ARGS]"),
        short_ids=True,
    ),
    Family(
        "mistral",
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        "",
        _json,
        as_json=("name", "arguments"),
        listed=True,
        short_ids=True,
    ),
    Family(
        "phi", ("<|/tool_call|>",), "<|tool_call|>", "<|/tool_call|>", _json, as_json=("name", "arguments"), listed=True
    ),
    Family("granite", ("<|tool_call|>",), "<|tool_call|>", "", _json, as_json=("name", "arguments"), listed=True),
    Family("nemotron", ("<TOOLCALL>",), "<TOOLCALL>", "</TOOLCALL>", _json, as_json=("name", "arguments"), listed=True),
    Family(
        "command",
        ("<|START_ACTION|>",),
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        lambda schemas: JsonCalls(("tool_name", "name"), ("parameters", "arguments")),
        as_json=("tool_name", "parameters"),
        listed=True,
    ),
    Family(
        "internlm",
        ("<|action_start|>", "<|plugin|>"),
        "<|action_start|><|plugin|>",
        "<|action_end|>",
        _json,
        as_json=("name", "parameters"),
    ),
    HERMES,
    Family(
        "llama-3",
        ("<|python_tag|>",),
        "<|python_tag|>",
        "",
        _json,
        opens=("{",),
        as_json=("name", "parameters"),
    ),
    Family(
        "llama-3-json",
        ('"parameters"', "<|start_header_id|>"),
        "",
        "",
        _json,
        opens=("{",),
        as_json=("name", "parameters"),
    ),
    Family("pythonic", ("[func_name1(",), "", "", lambda schemas: WholeCalls(python_calls), opens=("[",)),
)


@dataclass(frozen=True)
class Thinking:
    """The marks around a model's reasoning."""

    start: str
    end: str


THINKING = (
    Thinking("<think>", "</think>"),
    Thinking("[THINK]", "[/THINK]"),
    Thinking("<seed:think>", "</seed:think>"),
    Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
    Thinking("<reasoning>", "</reasoning>"),
)


def family_of(template: str) -> Family | None:
    """The family of a chat template; None if it shows no tools."""
    if "tools" not in template:
        return None
    return next((family for family in FAMILIES if all(mark in template for mark in family.template)), None)


def thinking_of(template: str) -> Thinking | None:
    """The marks of reasoning that a chat template knows; None for a model that does not reason."""
    return next((thinking for thinking in THINKING if thinking.end in template), None)
