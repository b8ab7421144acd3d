"""The metrics by name, and what each requires of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mnemos.errors import ConfigError

DEFAULT_METRICS = ("cold", "rss", "pp128", "pp512", "pp1024", "tg128", "tg128@d1024", "b8", "b32", "sampling")
_KINDS = "ppN, tgN, tgN@dN, bN, cold, rss, sampling (N: a number)"
_NAME = re.compile(r"(?P<kind>pp|tg|b)(?P<count>[1-9]\d{0,5})(?:@d(?P<depth>[1-9]\d{0,5}))?")
_PROMPT_OF_TG = 16
_LENGTH_OF_SAMPLING = 145  # a prompt of 16 tokens and 129 new ones


@dataclass(frozen=True)
class Metric:
    """kind: pp, tg or b with a count of tokens or sequences (and, for tg, of prompt tokens), cold, rss or sampling."""

    name: str
    kind: str
    count: int = 0
    depth: int = 0

    @property
    def length(self) -> int:
        """Positions that one sequence needs."""
        lengths = {"pp": self.count + 1, "tg": self.depth + self.count + 2, "b": 130, "sampling": _LENGTH_OF_SAMPLING}
        return lengths.get(self.kind, 0)


def parse_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics with these names; ConfigError for an unknown name, and if there are none."""
    if not names:
        raise ConfigError(f"no metric is named; give some of {_KINDS}")
    return [_parse(name) for name in names]


def _parse(name: str) -> Metric:
    if name in ("cold", "rss", "sampling"):
        return Metric(name, name)
    match = _NAME.fullmatch(name)
    if match is None or (match["depth"] and match["kind"] != "tg"):
        raise ConfigError(f"metric {name!r} is not one of {_KINDS}")
    kind, count = match["kind"], int(match["count"])
    if kind != "tg":
        return Metric(name, kind, count)
    # tg128@d1024 ends at a depth of 1,024 tokens, the last of which is chosen but not evaluated.
    depth = int(match["depth"]) - count - 1 if match["depth"] else _PROMPT_OF_TG
    if depth < 1:
        raise ConfigError(f"metric {name!r} needs a depth above {count + 1}")
    return Metric(name, kind, count, depth)
