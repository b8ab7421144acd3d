"""Chat templates: a conversation to the one text that a model was trained on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols

from mnemos.errors import ConfigError, FormatError, RequestError
from mnemos.text.sandbox import BoundedEnvironment, Budget, BudgetError, GenerationTag

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MAX_SOURCE = 1 << 18
_BASE_UNITS = 2_000_000
_UNITS_PER_INPUT = 100  # how often an honest template may handle each part of its input


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
        self._template = self._compile(source)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation. RequestError if the template refuses it, FormatError if it does not work.

        variables: what else the template may use, such as bos_token, eos_token, tools and documents.
        """
        values = {"tools": None, "documents": None, **variables}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            self._environment.budget = Budget(_BASE_UNITS)
            size = _size(values)
            self._environment.budget = Budget(_BASE_UNITS + _UNITS_PER_INPUT * size)
            try:
                return self._template.render(values)
            except _Raised as error:
                raise RequestError(f"{self.label}: the chat template refuses the messages: {error}") from None
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


def check_messages(messages: Any) -> list[Message]:
    """Messages as a list of mappings with a role."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is of type {type(messages).__name__}; it must be a list of {{'role', 'content'}}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] is {str(message)[:80]!r}; it must be a mapping with a 'role'")
    return list(messages)


def _size(values: Any) -> int:
    """About how many operations it takes to touch every part of the values once."""
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
    if len(pattern) > 256 or re.search(r"\d{3}", pattern):  # the C library pads as far as it is told
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
