"""Chat templates: the same text as transformers renders, and no template that runs away."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from mnemos.errors import ConfigError, FormatError, MnemosError, RequestError
from mnemos.text.chat import CHATML, ChatTemplate
from mnemos.text.tokenizer import Tokenizer

from .metadata import byte_level
from .templates import TEMPLATES

TALK = [
    {"role": "user", "content": "  What is <1 & 2>?\n"},
    {"role": "assistant", "content": "An \u00e4pfel"},
    {"role": "user", "content": "Yes"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<a>", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL_TALK = [
    *SYSTEM,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [TALK, SYSTEM, TALK[:1], TOOL_TALK])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_same_text_as_transformers(name: str, messages: list[dict[str, Any]], prompt: bool, tools: Any) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    try:
        (expected,), _ = utilities.render_jinja_template(
            [messages], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **NAMES
        )
    except Exception:  # the template itself refuses these messages
        with pytest.raises(RequestError):
            ChatTemplate(TEMPLATES[name]).render(messages, add_generation_prompt=prompt, tools=tools, **NAMES)
        return
    ours = ChatTemplate(TEMPLATES[name]).render(messages, add_generation_prompt=prompt, tools=tools, **NAMES)
    assert ours == expected


def test_helpers() -> None:
    assert ChatTemplate("{{ messages | tojson }}").render([{"a": "<&'\u00e9"}]) == '[{"a": "<&\'\u00e9"}]'
    assert ChatTemplate("{{ {'a': 1} | tojson(indent=2) }}").render([]) == '{\n  "a": 1\n}'
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]).isdigit()
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert ChatTemplate(loop).render([]) == "01"
    assert ChatTemplate("a{% generation %}b{% endgeneration %}c").render([]) == "abc"
    assert ChatTemplate("{{ 'a{}'.format(1) ~ '%s' % 2 ~ ['x', 'y'] | join(',') }}").render([]) == "a12x,y"
    trimmed = "  {% if true %}\n  x\n  {% endif %}\n"
    assert ChatTemplate(trimmed).render([]) == "  x\n"


def test_a_template_can_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "model.gguf")
    with pytest.raises(RequestError, match=r"model\.gguf: .*refuses the messages: roles must alternate"):
        template.render([])


def test_errors_name_the_line() -> None:
    with pytest.raises(FormatError, match=r"model\.gguf: line 2 of the chat template: .*endfor"):
        ChatTemplate("a\n{% for x in y %}\n", "model.gguf")
    with pytest.raises(RequestError, match=r"failed at line 3: 'nothing' is undefined"):
        ChatTemplate("a\n\n{{ nothing.at_all }}").render([])


BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested with conditions": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "continue": "{% for i in range(99999) %}{% for j in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "fibonacci": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times, swapped": "{{ 10**10 * 'a' }}",
    "list times": "{{ [1] * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "squares": "{% set n = namespace(a=10) %}{% for i in range(99999) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling lists": "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}",
    "doubling tuples": "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = (n.a, n.a) %}{% endfor %}",
    "doubling dicts": "{% set n = namespace(a=1) %}{% for i in range(99) %}{% set n.a = {1: n.a, 2: n.a} %}"
    "{% endfor %}",
    "doubling blocks": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set b %}{{ n.a }}{{ n.a }}{% endset %}"
    "{% set n.a = b %}{% endfor %}",
    "namespace in itself": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "padding, safe": "{{ ('a' | safe).ljust(10**9) }}",
    "centre": "{{ 'a' | center(10**9) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent many": "{{ ('%(x)s' * 100000) % {'x': 'a' * 100000} }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format many": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "join": "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "join filter": "{{ range(99999) | map('string') | join('a' * 100000) }}",
    "replace": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "indent": "{{ ('\\n' * 100000) | indent('x' * 100000, true) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "json separators": "{{ ([1] * 10000) | tojson(separators=('x' * 100000, ':')) }}",
    "output": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "literal output": "{% for i in range(99999) %}" + "y" * 200_000 + "{% endfor %}",
    "comparison": "{% set s = ['a'] * 100000 %}{% for i in range(99999) %}{% if s == s %}{% endif %}{% endfor %}",
    "tests": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{% if s is upper %}{% endif %}{% endfor %}",
    "slices": "{% set s = ['a'] * 100000 %}{% for i in range(99999) %}{% set t = s[:] %}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
    "many operands": "{% set s = 'a' * 1000000 %}{{ " + "~".join(["s"] * 5000) + " }}",
    "hashing": "{% set k = ('a',) * 100000 %}{% set d = {k: 1} %}{% for i in range(99999) %}{{ d[k] }}{% endfor %}",
    "changes": "{% set s = [1] * 100000 %}{% for i in range(99999) %}{{ loop.changed(s[:]) }}{% endfor %}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "integer text": "{{ ('f' * 10000000) | int(0, 16) }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "minus": "{{ " + "-" * 50_000 + "1 }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "attributes": "{{ ''.__class__.__mro__ }}",
    "include": "{% include 'x' %}",
    "size": "x" * (2 << 20),
}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_hostile_templates_end(name: str) -> None:
    with pytest.raises(MnemosError):
        ChatTemplate(BOMBS[name]).render(TALK)


@pytest.mark.parametrize("name", ["times", "doubling", "output", "literal output", "replace", "many operands"])
def test_hostile_templates_stay_small(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MnemosError):
            ChatTemplate(BOMBS[name]).render(TALK)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_an_honest_template_may_be_long() -> None:
    messages = [{"role": role, "content": "word " * 20_000} for _ in range(20) for role in ("user", "assistant")]
    text = ChatTemplate(CHATML).render(messages)
    assert len(text) > 40 * 100_000


def test_a_model_without_a_template(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    start = byte_level()["tokenizer.ggml.tokens"][:259]
    chatml = Tokenizer.from_metadata(byte_level(tokens=[*start, "<|im_start|>", "<|im_end|>"]), "small")
    text = chatml.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match=r"no chat template.*pass one as chat_template"):
        tokenizer_of("gpt-2").apply_chat_template(TALK)
    assert tokenizer_of("gpt-2").apply_chat_template(TALK, chat_template="{{ messages | length }}") == "3"


def test_ids_of_a_conversation(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    phi = tokenizer_of("phi-3")
    ids = phi.encode_chat(TALK[:1])
    assert ids[:2] == [1, 32010] and ids.count(1) == 1 and ids[-1] == 32001
    assert tokenizer_of("llama-spm").encode_chat(TALK, chat_template="x") == [1, *phi.encode("x", add_special=False)]


@pytest.mark.parametrize("messages", ["hi", {"role": "user"}, ["hi"], [{"content": "x"}], None, [{"role": 5}]])
def test_what_is_no_conversation(messages: Any, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(RequestError, match="messages"):
        tokenizer_of("qwen2").apply_chat_template(messages)
