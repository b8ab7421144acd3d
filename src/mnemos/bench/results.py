"""One measured figure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isnan


@dataclass(frozen=True)
class Result:
    """`limit` is what the machine's read bandwidth allows at most, in `unit`; None where that is not what binds.

    A value of nan: it could not be measured, and `unit` says why.
    """

    metric: str
    value: float
    unit: str
    limit: float | None = None
    engine: str = "mnemos"

    @property
    def share(self) -> float | None:
        return self.value / self.limit if self.limit else None

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "limit"}
        value = None if isnan(self.value) else round(self.value, 3)
        return json.dumps({"engine": values.pop("engine"), **values, "value": value})
