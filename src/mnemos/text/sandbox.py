"""A jinja2 environment in which a template cannot run forever or fill the memory.

Jinja's own sandbox keeps a template from code and files, but not from work: loops nest, strings multiply, and lists
that contain one list twice double with every level. Here everything that a template can do is paid for from a budget,
before or right after a step that cannot itself be large: loops by the item, calls, operators, comparisons, literals,
output. The price is what a step makes or reads: asking for a list's length costs the same whatever it holds, and a
text that grows pays for what is added to it. What cannot be priced (most padding methods and filters) is left out; the
lists below hold what chat templates use.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_UNIT = 16  # characters that cost as much as one operation
_MAX_INTEGER_BITS = 256
_MAX_WIDTH = 256
_SECONDS = 5.0
_CALL = 8  # calls are slow
_COPIED_AT_ONCE = 4096  # characters that are copied in about the time of one operation
# A format that pads to thousands of characters, or whose width is an argument.
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)|\{[^{}]*:[^{}]*(?:\d{4}|\{)")

_METHODS = {
    str: frozenset((
        "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
        "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
        "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
        "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    )),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    range: frozenset(("count", "index")),
    set: frozenset[str](),
    bytes: frozenset[str](),
    int: frozenset[str](),
    float: frozenset(("is_integer",)),
}  # fmt: skip
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape", "format",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "upper",
    "urlencode",
)  # fmt: skip
# Filters that look at the outside of a value, or hand it on as it is.
_SHALLOW_FILTERS = ("count", "d", "default", "first", "items", "last", "length", "list", "reverse")
# Tests that read all of what they are given; the others ask for its type.
_DEEP_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "divisibleby", "eq", "equalto", "even", "ge", "greaterthan", "gt", "in", "le",
    "lessthan", "lower", "lt", "ne", "odd", "upper",
)  # fmt: skip
_PASSED_BY_JINJA = ("_loop_vars", "_block_vars")
_GLOBALS = ("range", "dict", "namespace", "joiner", "cycler")


class BudgetError(SecurityError):
    """A template asked for more work or memory than any honest template needs."""


class Budget:
    """What one compilation or rendering may still spend, in units of about one operation or 16 characters."""

    def __init__(self, units: int) -> None:
        self._left = units
        self._deadline = time.monotonic() + _SECONDS
        self._until_clock = 1000

    def charge(self, units: int) -> None:
        self._left -= units
        self._until_clock -= 1
        if self._until_clock <= 0:
            self._until_clock = 1000
            if time.monotonic() > self._deadline:
                raise BudgetError(f"the template ran for more than {_SECONDS:.0f} seconds")
        if self._left < 0:
            raise BudgetError("the template does more work, or makes more text, than its messages can need")

    def charge_text(self, characters: int) -> None:
        self.charge(characters // _UNIT + 1)

    def charge_growth(self, lengths: list[int]) -> None:
        """Pays for a text made of parts of these lengths: for all but the longest, which is copied and not read."""
        self._until_clock -= sum(lengths) // _COPIED_AT_ONCE
        self.charge_text(sum(lengths) - max(lengths, default=0))

    def charge_outside(self, value: Any) -> None:
        """Pays for handling a value without its contents."""
        if isinstance(value, (str, bytes)):
            self.charge_text(len(value))
        else:
            self.charge(1 + (len(value) if isinstance(value, (dict, list, tuple)) else 0))

    def charge_value(self, value: Any) -> int:
        """Pays for handling `value` with its contents, counted as often as they are written out; returns the price."""
        before = self._left
        self._charge_parts([value])
        return before - self._left

    def _charge_parts(self, pending: list[Any]) -> None:
        while pending:
            item = pending.pop()
            if isinstance(item, (str, bytes)):
                self.charge_text(len(item))
                continue
            self.charge(1)
            if isinstance(item, dict):
                self.charge(len(item))
                pending += item
                pending += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                self.charge(len(item))
                pending += item
            elif isinstance(item, range):
                self.charge(len(item))
            elif isinstance(item, int) and item.bit_length() > _MAX_INTEGER_BITS:
                raise BudgetError(f"the template computes an integer of {item.bit_length()} bits")
            elif isinstance(item, Namespace):
                pending.append(object.__getattribute__(item, "_Namespace__attrs"))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget. `budget` is set for each compilation and rendering; one of them at a time."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, budget: Budget, extensions: list[Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, cache_size=0, optimized=False)
        self.budget = budget
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        filters: dict[str, Any] = dict(self.filters)
        self.filters = {name: self._priced(name, filters[name]) for name in _FILTERS}
        tests: dict[str, Any] = dict(TESTS)
        self.tests = {name: self._priced(name, test) if name in _DEEP_TESTS else test for name, test in tests.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Pricing().visit(super()._parse(source, name, filename))
        return template

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.charge(_CALL)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # jinja2 wraps str.format
        if owner is self:  # what _Pricing put in
            return __obj(*args)
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        if kind is not None:
            args = _with_list(args) if __obj.__name__ == "join" else args
            self._check_method(kind, owner, __obj.__name__, args, kwargs)
        elif not isinstance(__obj, Macro):
            self.budget.charge_value(args)
        result = super().call(__context, __obj, *args, **kwargs)
        if kind is dict:  # its contents, as they are
            self.budget.charge_outside(None if __obj.__name__ == "get" else owner)
        else:
            self.budget.charge_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.charge_growth([len(left), len(right)])
            return super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(left, list) and isinstance(right, list):
            self.budget.charge(1 + len(left) + len(right))
            return super().call_binop(context, operator, left, right)
        units = self.budget.charge_value((left, right))
        if operator == "*":
            self._check_repeat(left, right)
            self._check_repeat(right, left)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, units)
        result = super().call_binop(context, operator, left, right)
        self.budget.charge_value(result)
        return result

    def priced_value(self, value: Any) -> Any:
        """Pays for a value that passes through."""
        self.budget.charge_value(value)
        return value

    def priced_items(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pays for a loop, item by item."""
        for item in items:
            self.budget.charge(1)
            yield item

    def priced_text(self, characters: int) -> str:
        """Pays for text that stands in the template; is itself no text."""
        self.budget.charge_text(characters)
        return ""

    def joined(self, *parts: Any) -> str:
        """The operator ~."""
        for part in parts:
            if not isinstance(part, str):
                self.budget.charge_value(part)
        texts = [str(part) for part in parts]
        self.budget.charge_growth([len(text) for text in texts])
        return "".join(texts)

    def sliced(self, value: Any) -> Any:
        """Pays for a slice: a copy of the list or text, not of what its items contain."""
        self.budget.charge_outside(value)
        return value

    def _priced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that pays for its arguments and for its result."""
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def priced(*args: Any, **kwargs: Any) -> Any:
            given = _with_list(args[passed:]) if name == "join" else args[passed:]
            if name in _SHALLOW_FILTERS:
                copies = name in ("list", "reverse") or not isinstance(given[0], str)
                self.budget.charge_outside(given[0] if copies else None)
                return function(*args, **kwargs)
            units = self.budget.charge_value((given, kwargs))
            if name == "format":
                self._check_format(str(given[0]), units)
            self._check_filter(name, given, kwargs)
            result = function(*args[:passed], *given, **kwargs)
            self.budget.charge_value(result)
            return result

        return priced

    def _check_filter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, int)]
        if name in ("indent", "round", "tojson") and any(abs(number) > _MAX_WIDTH for number in numbers):
            raise BudgetError(f"the filter {name} has an argument beyond {_MAX_WIDTH}")
        if name == "indent":
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            lines = str(args[0]).count("\n") + 1
            self.budget.charge_text(lines * (len(width) if isinstance(width, str) else abs(width)))
        elif name == "tojson":
            self._check_json(args, kwargs)
        elif name in ("join", "replace"):
            self._check_growth(name, args, kwargs)

    def _check_json(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Each nested line is indented by its depth, and each item brings a separator."""
        options = [*args[1:], *kwargs.values()]
        texts = [part for option in options for part in (option if isinstance(option, (tuple, list)) else (option,))]
        if any(isinstance(text, str) and len(text) > _UNIT for text in texts):
            raise BudgetError(f"the filter tojson has a separator or indent of more than {_UNIT} characters")
        if any(option is not None for option in options):
            for _ in range(_UNIT):
                self.budget.charge_value(args[:1])

    def _check_growth(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """join and replace copy a text many times."""
        values = (*args, *kwargs.values())
        longest = max((len(value) for value in values[1:] if isinstance(value, str)), default=0)
        times = len(values[0]) + 1 if hasattr(values[0], "__len__") else 0
        self.budget.charge_text(longest * times)

    def _check_format(self, text: str, units: int) -> None:
        """`units` is what the format and its arguments cost; each field may write out all of them."""
        if _WIDE.search(text):
            raise BudgetError(f"the template formats with {text[:80]!r}, which asks for very wide fields")
        self.budget.charge(units * (text.count("%") + text.count("{")))

    def _check_repeat(self, value: Any, times: Any) -> None:
        if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int) and times > 1:
            if isinstance(value, (str, bytes)):
                self.budget.charge_text(len(value) * times)
            else:
                self.budget.charge(len(value) * times)

    def _check_method(self, kind: type, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in _METHODS[kind]:
            allowed = ", ".join(sorted(_METHODS[kind])) or "none"
            raise SecurityError(f"the method {name} of {kind.__name__} is not for templates; those that are: {allowed}")
        given = [kwargs[key] for key in kwargs if key not in _PASSED_BY_JINJA]
        units = self.budget.charge_value((None if kind is dict else owner, args, given))
        if name == "format":
            self._check_format(owner, units)
        elif name == "join":
            self.budget.charge_text(len(owner) * (len(args[0]) if args and hasattr(args[0], "__len__") else 0))
        elif name == "replace":
            self._check_growth(name, (owner, *args), kwargs)


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_INTEGER_BITS:
        raise BudgetError(f"the template computes {base} ** {exponent}")


def _with_list(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of join with the items in a list, so that they can be counted."""
    return (list(args[0]), *args[1:]) if args and isinstance(args[0], Iterator) else args


class _Pricing(NodeTransformer):
    """Puts a price on everything in a parsed template that the environment's own methods do not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("priced_items", node.iter)
        node.body.insert(0, nodes.Output([_call("priced_text", nodes.Const(0))]))  # recursive loops skip `iter`
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        literal = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        priced = [
            child if isinstance(child, nodes.TemplateData) else _call("priced_value", child) for child in node.nodes
        ]
        node.nodes = [_call("priced_text", nodes.Const(literal)), *priced]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("priced_value", node.expr)
        for operand in node.ops:
            operand.expr = _call("priced_value", operand.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("priced_value", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("priced_value", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("priced_value", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call("sliced", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _call("priced_value", node.arg)  # a key is hashed, all of it
        return node


def _call(method: str, *args: Any) -> nodes.Call:
    """A call of one of the environment's methods."""
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=args[0].lineno)


class GenerationTag(Extension):
    """`{% generation %}`: marks what the model wrote, for training; here it is just a scope."""

    tags = {"generation"}  # noqa: RUF012, as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)
