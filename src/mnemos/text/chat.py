"""Chat templates: from a conversation to the exact text that a model was trained on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols

from mnemos.errors import ConfigError, FormatError, MnemosError, RequestError
from mnemos.text.conversation import (
    Message,
    TemplateRefusal,
    cut_at_end,
    mark_control_texts,
    mark_end,
    prepare_messages,
    refuse_lost_messages,
)
from mnemos.text.sandbox import BoundedEnvironment, Budget, BudgetError, GenerationTag

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MAX_SOURCE = 1 << 18
_BASE_UNITS = 2_000_000
_UNITS_PER_INPUT = 100  # how often an honest template may handle each part of its input


_PROBE = "qzqprobe"  # probes a template: a text that no template and no conversation contains


class _Raised(Exception):
    """raise_exception was called: the template itself refuses the messages."""


class ChatTemplate:
    """A compiled chat template. Safe to use from many threads.

    label: where the template comes from, for errors.
    """

    def __init__(self, source: str, label: str = "chat template") -> None:
        if len(source) > MAX_SOURCE:
            raise FormatError(f"{label}: the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        self.label = label
        self._lock = threading.Lock()
        self._environment = BoundedEnvironment(Budget(_BASE_UNITS), [GenerationTag, loopcontrols])
        self._environment.filters["tojson"] = self._environment._priced("tojson", _to_json)
        self._environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.source = source
        self._template = self._compile(source)
        self._takes_parts: bool | None = None
        self._takes_objects: bool | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        control_texts: Iterable[str] = (),
        **variables: Any,
    ) -> str:
        """The text of a conversation. RequestError if the template refuses it, FormatError if it does not work.

        messages: as `mnemos.text.conversation.prepare_messages` takes them.
        continue_final_message: the text ends with the last message's content, whose author continues; then no prompt is
        added. control_texts: names of control tokens; where a user or a tool wrote one, it gets a PLAIN_MARK.
        variables: what else the template may use, such as bos_token, eos_token, tools and documents.
        """
        prepared = mark_control_texts(prepare_messages(messages, self), control_texts)
        if continue_final_message:
            text = self._render(mark_end(prepared), add_generation_prompt=False, **variables)
            text = cut_at_end(text, self.label)
        else:
            text = self._render(prepared, add_generation_prompt=add_generation_prompt, **variables)
        refuse_lost_messages(prepared, text, self.label)
        return text

    def takes_parts(self) -> bool:
        """Whether the template writes the text of `{"type": "text", "text": ...}` parts."""
        if self._takes_parts is None:
            text = self._try([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
            self._takes_parts = _PROBE in text and "'text'" not in text and '"text"' not in text
        return self._takes_parts

    def takes_objects(self) -> bool:
        """Whether the arguments of a tool call may be an object; else they are JSON text."""
        if self._takes_objects is None:
            as_object, as_text = (self._try(_call_probe(given)) for given in ({_PROBE: 1}, f'{{"{_PROBE}": 1}}'))
            self._takes_objects = (_PROBE in as_object and f"'{_PROBE}'" not in as_object) or _PROBE not in as_text
        return self._takes_objects

    def _try(self, messages: list[Message]) -> str:
        """The text of messages that the template may refuse, empty then."""
        try:
            return self._render(messages, add_generation_prompt=False)
        except MnemosError:
            return ""

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **variables: Any) -> str:
        values = {"tools": None, "documents": None, **variables}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            self._environment.budget = Budget(_BASE_UNITS)
            size = _size(values)
            self._environment.budget = Budget(_BASE_UNITS + _UNITS_PER_INPUT * size)
            try:
                return self._template.render(values)
            except _Raised as error:
                raise TemplateRefusal(f"{self.label}: the chat template refuses the messages: {error}") from None
            except (BudgetError, RecursionError, MemoryError) as error:
                problem = str(error) or type(error).__name__
                raise FormatError(f"{self.label}: the chat template was stopped{_line(error)}: {problem}") from None
            except Exception as error:  # a template is a program: it can fail in any way
                raise RequestError(f"{self.label}: the chat template failed{_line(error)}: {error}") from error

    def _compile(self, source: str) -> Template:
        try:
            return self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise FormatError(f"{self.label}: line {error.lineno} of the chat template: {error.message}") from error
        except BudgetError as error:
            raise FormatError(f"{self.label}: the chat template was stopped: {error}") from error
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise FormatError(f"{self.label}: the chat template cannot be compiled: {error}") from error


def default_template(has_token: Any, label: str) -> str:
    """ChatML, for a model that has its tokens and no template of its own."""
    if has_token("<|im_start|>") and has_token("<|im_end|>"):
        return CHATML
    raise ConfigError(
        f"{label}: the model has no chat template, and its vocabulary has no <|im_start|> and <|im_end|> for the "
        "default; pass one as chat_template (Jinja text), or prompt it without a conversation"
    )


def _call_probe(arguments: object) -> list[Message]:
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _size(values: Any) -> int:
    """Roughly how many operations it takes to touch every part of the values once."""
    units, pending, seen = 0, [values], 0
    while pending and seen < _BASE_UNITS:
        item = pending.pop()
        seen += 1
        units += 1
        if isinstance(item, str):
            units += len(item) // 16
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            pending += item
    return units


def _line(error: BaseException) -> str:
    """Where in the template an error happened, if that can be known."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" at line {line}"


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"\d{3}", pattern):  # the C library pads to any width
        raise BudgetError(f"strftime_now has the format {pattern[:80]!r}")
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escaping that jinja2's own filter does for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
