"""The Python in the documents, for the tests that run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_python(
    name: str, values: dict[str, Any], replaced: Mapping[str, str] | None = None, chosen: slice = slice(None)
) -> None:
    """Runs the chosen blocks of a document one after another, with `values` as their names.

    replaced: what is too large for a test, and what stands in for it; all of it must be in the document.
    """
    text = (ROOT / name).read_text(encoding="utf-8")
    for old, new in (replaced or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[chosen]
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), values)
