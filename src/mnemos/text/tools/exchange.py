"""A conversation with tools and reasoning as a prompt, and the way to read what answers it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from mnemos.errors import RequestError, shown
from mnemos.text.conversation import Message, TemplateRefusal, check_messages
from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tools.budget import ReasoningBudget
from mnemos.text.tools.families import HERMES, Family, Thinking, family_of, thinking_of
from mnemos.text.tools.forcing import forced_calls, forcible
from mnemos.text.tools.forms import Schemas
from mnemos.text.tools.reader import AnswerReader
from mnemos.text.turns import with_turns

TOOL_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


@dataclass(frozen=True)
class Exchange:
    """A prompt, what its generation needs, and how its answer is read.

    fields   of GenerationConfig: the grammar of forced calls, the end of a single call, the budget of reasoning
    marks    the ids of special tokens that are marks, with their texts, which the answer's text leaves out
    render   returns the conversation as the text whose tokens the prompt is; None for a prompt that is none
    plain    True if an answer can only be text
    """

    prompt_ids: list[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    family: Family | None = None
    thinking: Thinking | None = None
    schemas: Schemas = field(default_factory=dict)
    inside: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)
    render: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    @property
    def plain(self) -> bool:
        return self.family is None and self.thinking is None

    def reader(self) -> AnswerReader:
        """A reader for one answer."""
        return AnswerReader(self.family, self.thinking, self.schemas, inside=self.inside)


def exchange(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    mode: str = "auto",
    name: str | None = None,
    parallel: bool | None = None,
    continues: bool = False,
    thinking: bool | None = None,
    budget: int | None = None,
    template: Mapping[str, Any] = MappingProxyType({}),
) -> Exchange:
    """Renders a conversation whose answer may call tools or begin with reasoning.

    tools: functions in OpenAI's form. mode: none, auto or required; name: the tool that must be called.
    parallel: whether several calls may be made; None: unless a call is forced, since a small model that must call
    repeats itself. continues: the last message is continued. thinking: whether the model reasons
    first; None leaves it to the template. budget: most tokens of reasoning. template: variables of the chat template.
    RequestError for malformed tools.
    """
    functions = functions_of(tools)
    source = tokenizer.template_for(template.get("chat_template"), tools if functions else None).source
    native = "tools" in source
    family = None
    if functions and mode != "none":
        family = family_of(source) or HERMES
        if mode == "required":
            family = forcible(family)
    if not native:
        messages = spelled_out(messages, functions if mode != "none" else [])
    marks = thinking_of(source)
    if thinking is not None:
        template = {"enable_thinking": thinking, "thinking": thinking, **template}
    shown_tools = [dict(tool) for tool in tools] if native and functions and mode != "none" else None
    variables = {**template, "tools": shown_tools, "continue_final_message": continues}
    prompt_ids, messages = _encoded(tokenizer, messages, not continues, variables)
    inside = marks is not None and _opens_reasoning(tokenizer, prompt_ids, marks)
    wanted = [function for function in functions if name is None or function["name"] == name]
    fields: dict[str, Any] = {}
    specials = partial(_special_ids, tokenizer)
    if family is not None and mode == "required":
        single = name is not None or parallel is not True
        fields["grammar"] = forced_calls(
            family, wanted, single=single, specials=specials, thinking=marks if inside else None
        )
    elif family is not None and parallel is False and family.end:
        fields["stop"] = [family.end]
        fields["include_stop_str_in_output"] = True
    if budget is not None and marks is not None:
        fields["logits_processors"] = [ReasoningBudget(budget, marks, tokenizer, inside=inside)]
    texts = [*_mark_texts(family), *((marks.start, marks.end) if marks else ())]
    known = {token: tokenizer.decode([token], skip_special=False) for text in texts for token in specials(text)}
    return Exchange(
        prompt_ids,
        fields,
        family,
        marks,
        {one["name"]: one.get("parameters") or {} for one in functions},
        inside,
        known,
        partial(tokenizer.apply_chat_template, messages, not continues, **variables),
    )


def _encoded(
    tokenizer: Tokenizer, messages: Sequence[Message], prompted: bool, variables: Mapping[str, Any]
) -> tuple[list[int], Sequence[Message]]:
    """The conversation's token ids, and its messages in the form in which the template takes them."""
    try:
        return tokenizer.encode_chat(messages, prompted, **variables), messages
    except TemplateRefusal:
        for form in with_turns(check_messages(messages)):
            with suppress(TemplateRefusal):
                return tokenizer.encode_chat(form, prompted, **variables), form
        raise


def functions_of(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The functions among the tools, checked; tools of other types are somebody else's and are left out."""
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{index}] is {shown(tool)}; it must be an object")
        if tool.get("type", "function") != "function":
            continue
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise RequestError(
                f"tools[{index}].function.name is {shown(name)}; it must be 1 to 128 letters, digits, _, - or ."
            )
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RequestError(f"tools[{index}].function.parameters is {shown(parameters)}; it must be a JSON schema")
        functions.append(dict(function))
    return functions


def spelled_out(messages: Sequence[Message], functions: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation for a template that knows no tools: they, their calls and results are written as text."""
    written: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        if calls and isinstance(calls, Sequence) and not isinstance(calls, str):
            text = "\n".join([str(message.get("content") or ""), *map(_written_call, calls)]).strip()
            written.append({"role": message.get("role"), "content": text})
        elif isinstance(message, Mapping) and message.get("role") in ("tool", "function"):
            content = message.get("content")
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            written.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
        else:
            written.append(message)
    if not functions:
        return written
    listed = "\n".join(json.dumps({"type": "function", "function": one}, ensure_ascii=False) for one in functions)
    text = (
        f"You may call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, answer with a JSON object with its name and arguments between tags:\n"
        '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    )
    first = written[0] if written and isinstance(written[0], Mapping) else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *written[1:]]
    return [{"role": "system", "content": text}, *written]


def _opens_reasoning(tokenizer: Tokenizer, prompt_ids: list[int], marks: Thinking) -> bool:
    """Whether the prompt ends with the mark that begins reasoning."""
    return tokenizer.decode(prompt_ids[-8:], skip_special=False).rstrip().endswith(marks.start)


def _special_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that consists of special tokens; none for any other."""
    ids = tokenizer.encode(text, add_special=False) if text else []
    return ids if all(token in tokenizer.special_ids for token in ids) else []


def _mark_texts(family: Family | None) -> list[str]:
    return [] if family is None else [text for text in (family.start, family.end, *family.around) if text]


def _written_call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else {}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = function.get("name") if isinstance(function, Mapping) else ""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {written or "{}"}}}\n</tool_call>'
