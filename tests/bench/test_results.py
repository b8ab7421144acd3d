"""Figures as the bench prints and writes them."""

from pathlib import Path

import pytest

from mnemos.bench.results import insert_table
from mnemos.errors import ConfigError


def test_a_table_replaces_what_stands_between_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- a -->\nold\n<!-- /a -->\n<!-- b -->\nold\n<!-- /b -->\nafter\n")
    insert_table(file, "b", "new")
    assert file.read_text() == "before\n<!-- a -->\nold\n<!-- /a -->\n<!-- b -->\nnew\n<!-- /b -->\nafter\n"
    with pytest.raises(ConfigError, match="lacks the lines <!-- c --> and <!-- /c -->"):
        insert_table(file, "c", "new")
