"""Rules that check the values of parameters, and hints for unknown names.

A check is a function that returns the value in its normal form, or None if it is not allowed. NumPy's
numbers are accepted as numbers, since they are registered with `numbers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from mnemos.errors import ConfigError, shown

LARGEST_INT = 2**31 - 1
_NUMBERS: tuple[Any, ...] = (int, float, Real)
Check = Callable[[Any], Any]


@dataclass(frozen=True)
class Rule:
    """A kind of value with its range.

    check    returns a value's normal form, or None if it is not allowed
    meaning  completes "must be ..."
    kind     integer, number, flag, text, name (one of a few texts), list, or one that only its user knows; tells a
             command line how to read a value
    item     the rule of a list's items
    low      the smallest number allowed, or the limit above which numbers are; None where there is no limit
    high     the largest number allowed, or the limit below which numbers are
    names    the texts that are allowed, where there are only a few
    """

    check: Check
    meaning: str
    kind: str = "other"
    item: Rule | None = None
    low: float | None = None
    high: float | None = None
    names: tuple[str, ...] = ()

    def apply(self, field: str, value: Any) -> Any:
        """The normal form of the field's value. ConfigError if the value is not allowed."""
        normal = self.check(value)
        if normal is None:
            raise ConfigError(f"{field} is {shown(value)}; it must be {self.meaning}")
        return normal


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int | None:
        whole = isinstance(value, (int, Integral)) and not isinstance(value, bool)
        return int(value) if whole and low <= value <= high else None

    return check


def whole(low: int, high: int = LARGEST_INT) -> Rule:
    """An int, or a NumPy integer, from `low` to `high`; True and False are not."""
    limits = f"of at least {low}" if high == LARGEST_INT else f"from {low} to {high}"
    return Rule(_integer(low, high), f"a whole number {limits}", "integer", low=low, high=high)


def real(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A number from `low` to `high`, open ends excluded; never NaN."""

    def check(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            return None
        if not low <= value <= high:  # before the conversion, which a large whole number would not survive
            return None
        number = float(value)
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        return number if above and below else None

    start = f"above {low:g}" if open_low else f"from {low:g}"
    return Rule(check, f"a number {start} {'and below' if open_high else 'to'} {high:g}", "number", low=low, high=high)


def one_of(*names: str) -> Rule:
    """One of these strings."""
    meaning = f"one of {', '.join(names)}"
    return Rule(
        lambda value: value if isinstance(value, str) and value in names else None, meaning, "name", names=names
    )


def text(longest: int) -> Rule:
    """A string of 1 to `longest` characters."""

    def check(value: Any) -> str | None:
        return value if isinstance(value, str) and 0 < len(value) <= longest else None

    return Rule(check, f"a non-empty string of at most {longest} characters", "text")


def several(item: Rule, most: int, *, single: bool = True) -> Rule:
    """A tuple of values that `item` allows; with `single`, one such value alone means a tuple of one."""

    def check(value: Any) -> tuple[Any, ...] | None:
        if single and (one := item.check(value)) is not None:
            return (one,)
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            return None
        found = []
        for element in value:
            found.append(item.check(element))
            if found[-1] is None or len(found) > most:
                return None
        return tuple(found)

    alone = f"{item.meaning}, or " if single else ""
    return Rule(check, f"{alone}a list of at most {most}, each {item.meaning}", "list", item)


def filled(rule: Rule) -> Rule:
    """The values that `rule` allows, except empty ones."""
    return replace(rule, check=lambda value: rule.check(value) or None, meaning=f"not empty and {rule.meaning}")


FLAG = Rule(lambda value: value if isinstance(value, bool) else None, "True or False", "flag")
COUNT = whole(1)
DTYPE = one_of("auto", "float32", "bfloat16", "float16")  # for weights
PERFORMANCE_MODE = one_of("performance", "balanced", "efficiency")
KV_DTYPE = one_of("auto", "float32", "float16", "bfloat16", "int8")  # for the key/value cache


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to this one; None if none is similar."""
    import difflib

    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)), None)


def hint(name: str, known: Iterable[str], what: str) -> str:
    """The end of a sentence about an unknown name: the most similar known one, or all of them, introduced by `what`."""
    listed = list(known)
    near = nearest(name, listed)
    return f"did you mean {near}?" if near else f"{what} are {', '.join(listed)}"
