"""Readers of single tool calls, one for each way in which models write them.

A reader is fed the text after a call's opening mark, as it arrives. It returns fragments and says when the call is
over. Nothing in a call is ever evaluated; what cannot be read is given back as the text that it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mnemos.text.tools.fragments import CallArguments, CallName, Fragment
from mnemos.text.tools.json_scan import ValueScan

_LONGEST_HEAD = 4096  # characters up to a call's arguments
Schemas = Mapping[str, Mapping[str, Any]]  # the parameters of each tool, by its name


class CallReader(Protocol):
    """Reads what is between a call's opening and closing marks."""

    def push(self, text: str) -> list[Fragment]:
        """The fragments that `text` completes. ValueError if this is no call."""

    def finish(self) -> list[Fragment]:
        """The fragments that only the end of the call makes certain. ValueError if this was no call."""


class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, alone, in a list, or several after each other.

    names, arguments: the keys under which the name and the arguments are found. The arguments are passed on as they
    arrive if the name precedes them, otherwise at the object's end.
    """

    def __init__(
        self, names: tuple[str, ...] = ("name",), arguments: tuple[str, ...] = ("arguments", "parameters")
    ) -> None:
        self._keys = (names, arguments)
        name, value = ("|".join(map(re.escape, keys)) for keys in (names, arguments))
        self._head = re.compile(
            rf'\s*[\[,;]?\s*\{{\s*"(?:{name})"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:{value})"\s*:\s*(?=[{{\[])'
        )
        # Its first key is another one, or its name's value no string: it cannot begin in the usual way any more.
        self._unusual = re.compile(rf'\{{\s*(?:"(?!(?:{name})")[^"]*"\s*:|"(?:{name})"\s*:\s*[^"\s]|[^"\s])')
        self._rest = ""  # not read yet
        self._object: ValueScan | None = None  # of a call that does not begin in the usual way
        self._parts: list[str] = []  # what it has seen
        self._arguments: ValueScan | None = None
        self._closing = False  # the arguments are complete, the object is not
        self._calls = 0

    def push(self, text: str) -> list[Fragment]:
        self._rest += text
        fragments: list[Fragment] = []
        while self._rest:
            before = len(self._rest)
            fragments += self._step()
            if len(self._rest) == before:
                break
        return fragments

    def finish(self) -> list[Fragment]:
        if self._arguments is not None or self._closing:  # cut off in the middle: what is there was passed on
            return []
        left = ("".join(self._parts) + self._rest).strip().strip("[],;").strip()
        if left:
            return self._whole(left)
        if not self._calls:
            raise ValueError("no call")
        return []

    def _step(self) -> list[Fragment]:
        if self._arguments is not None:
            taken = self._arguments.feed(self._rest)
            piece, self._rest = self._rest[:taken], self._rest[taken:]
            if self._arguments.done:
                self._arguments, self._closing = None, True
            return [CallArguments(piece)] if piece else []
        if self._closing:
            end = self._rest.find("}")
            self._rest = "" if end < 0 else self._rest[end + 1 :]
            self._closing = end < 0
            return []
        return self._begin()

    def _begin(self) -> list[Fragment]:
        head = self._head.match(self._rest) if self._object is None else None
        if head:
            self._rest = self._rest[head.end() :]
            self._arguments = ValueScan()
            self._calls += 1
            return [CallName(json.loads(f'"{head[1]}"', strict=False))]
        if self._object is None:
            opening = self._rest.find("{")
            if opening < 0:
                if self._rest.strip().strip("[],;"):
                    raise ValueError("not JSON")
                return []
            if len(self._rest) - opening < _LONGEST_HEAD and not self._unusual.match(self._rest, opening):
                return []  # it may still begin in the usual way
            self._rest, self._object = self._rest[opening:], ValueScan()
        taken = self._object.feed(self._rest)
        self._parts.append(self._rest[:taken])
        self._rest = self._rest[taken:]
        if not self._object.done:
            return []
        whole, self._object, self._parts = "".join(self._parts), None, []
        return self._whole(whole)

    def _whole(self, text: str) -> list[Fragment]:
        value = json.loads(text, strict=False)
        found = value if isinstance(value, dict) else {}
        inner = found.get("function")
        found = inner if isinstance(inner, dict) else found
        name = next((found[key] for key in (*self._keys[0], "function") if isinstance(found.get(key), str)), None)
        if name is None:
            raise ValueError("a call without a name")
        self._calls += 1
        arguments: Any = next((found[key] for key in self._keys[1] if key in found), {})
        return call(name, arguments)


class NamedJson:
    """A name, a mark, and the arguments as a JSON value: `get_weather[ARGS]{"city": "Paris"}`.

    separator: the mark after the name. prefix: a text before it that is no part of it. Anything between the name and
    the arguments, such as the beginning of a Markdown code fence, is skipped.
    """

    def __init__(self, separator: str, prefix: str = "") -> None:
        self._separator, self._prefix = separator, prefix
        self._head = ""
        self._scan: ValueScan | None = None
        self._begun = False

    def push(self, text: str) -> list[Fragment]:
        fragments: list[Fragment] = []
        if self._scan is None:
            self._head += text
            name, found, text = self._head.partition(self._separator)
            if not found:
                if len(self._head) > _LONGEST_HEAD:
                    raise ValueError("a call without arguments")
                return []
            fragments.append(CallName(_clean_name(name, self._prefix)))
            self._scan = ValueScan()
            self._head = ""
        if not self._begun:
            self._head += text
            start = re.search(r"[{\[]", self._head)
            if start is None:
                self._head = self._head[-1:]
                return fragments
            text, self._begun = self._head[start.start() :], True
        if not self._scan.done:
            taken = self._scan.feed(text)
            fragments.append(CallArguments(text[:taken]))
        return fragments

    def finish(self) -> list[Fragment]:
        if self._scan is None:
            raise ValueError("a call without arguments")
        return [] if self._begun else [CallArguments("{}")]


class WholeCalls:
    """Calls that only their whole text makes clear; `read` gets it at the end, and raises ValueError for no call."""

    def __init__(self, read: Callable[[str], list[Fragment]]) -> None:
        self._read = read
        self._text: list[str] = []

    def push(self, text: str) -> list[Fragment]:
        self._text.append(text)
        return []

    def finish(self) -> list[Fragment]:
        return self._read("".join(self._text))


def tagged_call(text: str, schemas: Schemas, name: str, pair: str) -> list[Fragment]:
    """`<function=name><parameter=key>value</parameter></function>` and its relatives: values are raw text.

    Their types are those of the tool's parameters. name, pair: patterns of the name, and of a key with its value.
    """
    found = re.search(name, text, re.DOTALL)
    if found is None:
        raise ValueError("a call without a name")
    called = found[1].strip()
    properties = schemas.get(called, {}).get("properties")
    typed = properties if isinstance(properties, dict) else {}
    pairs = re.findall(pair, text[found.end() :], re.DOTALL)
    return call(called, {key.strip(): typed_value(value, typed.get(key.strip())) for key, value in pairs})


def python_calls(text: str) -> list[Fragment]:
    """`[f(a=1), g(b="x")]`: calls in Python's syntax with literal arguments, read with a parser, never run."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError("not Python calls") from error
    fragments: list[Fragment] = []
    for node in tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("not a call by keywords")
        arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg is not None}
        fragments += call(ast.unparse(node.func), arguments)
    if not fragments:
        raise ValueError("no call")
    return fragments


def braced_call(text: str, escape: str) -> list[Fragment]:
    """`call:name{key:<escape>text<escape>,count:3}`: keys without quotes, strings between marks (`escape`)."""
    text, mark = text.strip(), re.escape(escape)
    head = re.match(r"(?:call:)?([\w.\-]+)\{", text)
    if head is None or not text.endswith("}"):
        raise ValueError("not a call")
    quoted = re.split(rf"{mark}(.*?){mark}", text[head.end() - 1 :], flags=re.DOTALL)
    parts = [
        json.dumps(part) if index % 2 else re.sub(r"([{,]\s*)([\w\-]+)\s*:", r'\1"\2":', part)
        for index, part in enumerate(quoted)
    ]
    return call(head[1], json.loads("".join(parts)))


def call(name: str, arguments: Any) -> list[Fragment]:
    """A whole call. Arguments that are JSON text already stay as they are."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [CallName(name), CallArguments(text)]


def typed_value(text: str, schema: Any) -> Any:
    """A parameter's raw text as a value of the type that its schema names; text where that is not possible."""
    text = text.removeprefix("\n").removesuffix("\n")
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and not ("null" in kinds and text == "null"):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    return value if schema is not None else (text if isinstance(value, str) else value)


def _clean_name(name: str, prefix: str) -> str:
    name = name.strip().removeprefix(prefix)
    return re.sub(r":\d+$", "", name).strip()
