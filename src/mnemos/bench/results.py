"""One measured figure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path

from mnemos.errors import ConfigError


@dataclass(frozen=True)
class Result:
    """`limit` is the most that the machine allows, in `unit`, because of `bound` (bandwidth or arithmetic); or None.

    A value of nan means that it could not be measured, and `unit` says why.
    """

    metric: str
    value: float
    unit: str
    limit: float | None = None
    bound: str = ""
    engine: str = "mnemos"

    @property
    def share(self) -> float | None:
        return self.value / self.limit if self.limit else None

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name not in ("limit", "bound")}
        value = None if isnan(self.value) else round(self.value, 3)
        return json.dumps({"engine": values.pop("engine"), **values, "value": value})


def insert_table(file: Path, name: str, text: str) -> None:
    """Replaces a document's text between the lines `<!-- name -->` and `<!-- /name -->`.

    ConfigError if the document lacks one of them.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        raise ConfigError(f"{file} lacks the lines {begin.strip()} and {end}")
    file.write_text(f"{head}{begin}{text}\n{end}{tail}", encoding="utf-8")
