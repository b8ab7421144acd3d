"""Conversations of agents reach templates that insist on alternating roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import RequestError
from mnemos.text.chat import ChatTemplate
from mnemos.text.conversation import TemplateRefusal
from mnemos.text.tools.exchange import exchange, spelled_out
from mnemos.text.turns import with_turns

# As Gemma's: 3 takes a system message before the user's first, 2 none at all.
STRICT = (
    "{%- for message in messages[start:] -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '[' + message.role + '] ' + message.content }}{%- endfor -%}"
)
GEMMA_3 = (
    "{%- set start = 1 if messages[0].role == 'system' else 0 -%}"
    "{%- if start -%}{{ '(' + messages[0].content + ')' }}{%- endif -%}" + STRICT
)
GEMMA_2 = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set start = 0 -%}" + STRICT
)
SYSTEM, DEVELOPER = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
FIRST, SECOND = {"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "r"}


def rendered(source: str, messages: list[dict[str, Any]]) -> str:
    """The text of the first form that the template takes."""
    template = ChatTemplate(source)
    for form in with_turns(spelled_out(messages, [])):
        try:
            return template.render(form)
        except TemplateRefusal:
            pass
    raise AssertionError("the template refuses every form")


@pytest.mark.parametrize(
    ("messages", "with_system", "without"),
    [
        ([FIRST, SECOND], "[user] a\nb", "[user] a\nb"),
        ([SYSTEM, DEVELOPER, FIRST], "(s\n\nd)[user] a", "[user] s\n\nd\n\na"),
        ([SYSTEM, FIRST, {**DEVELOPER, "content": "late"}], "(s)[user] a\n\nlate", "[user] s\n\na\n\nlate"),
    ],
)
def test_neighbours_are_joined_and_a_system_message_is_the_users_where_there_is_none(
    messages: list[dict[str, Any]], with_system: str, without: str
) -> None:
    assert rendered(GEMMA_3, messages) == with_system
    assert rendered(GEMMA_2, messages) == without


def test_results_of_several_tools_are_one_turn() -> None:
    text = rendered(GEMMA_3, [FIRST, CALLS, RESULT, RESULT, {"role": "user", "content": "go on"}])
    assert text.count("[user]") == 2 and text.count("<tool_response>") == 2 and text.endswith("go on")


def test_calls_of_joined_messages_are_kept() -> None:
    (form,) = with_turns([FIRST, CALLS, CALLS, RESULT])
    assert [message["role"] for message in form] == ["user", "assistant", "tool"]
    assert form[1]["tool_calls"] == [CALL, CALL]


def test_a_conversation_reaches_a_strict_template(smollm2: Path) -> None:
    with InferenceEngine.from_pretrained(smollm2) as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        read = exchange(tokenizer, [SYSTEM, FIRST, SECOND], template={"chat_template": GEMMA_2})
        assert tokenizer.decode(read.prompt_ids) == "[user] s\na\nb"
        assert read.render is not None and read.render() == "[user] s\na\nb"
        with pytest.raises(RequestError, match="roles must alternate"):  # no form begins with the assistant
            exchange(tokenizer, [{"role": "assistant", "content": "x"}, FIRST], template={"chat_template": GEMMA_2})
