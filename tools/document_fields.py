"""Writes the tables of docs/generation.md from the rows of mnemos.decoding.fields."""

from __future__ import annotations

from pathlib import Path

from mnemos.decoding.fields import FIELDS, GROUPS, Field

DOCUMENT = Path(__file__).parents[1] / "docs" / "generation.md"
BEGIN, END = "<!-- the tables are made by tools/document_fields.py -->\n", "<!-- end of the tables -->\n"
HEAD = "| field | what it does | value | default | elsewhere |\n| - | - | - | - | - |\n"


def tables() -> str:
    """A section for each group, with a row for each of its fields."""
    sections = []
    for group, title in GROUPS.items():
        rows = "".join(row(field) for field in FIELDS if field.group == group)
        sections.append(f"## {title[0].upper()}{title[1:]}\n\n{HEAD}{rows}")
    return "\n".join(sections)


def row(field: Field) -> str:
    names = [*([f"`{field.alias}` (here too)"] if field.alias else []), *(f"`{name}`" for name in field.elsewhere)]
    values = [f"{_code(given)} = {'default' if meant is None else _code(meant)}" for given, meant in field.means]
    value = "; ".join([field.rule.meaning, *values])
    default = "" if field.default in (None, ()) else _code(field.default)
    cells = (f"`{field.name}`", field.help, value, default, ", ".join(names))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def document(text: str) -> str:
    """`text` with its tables regenerated."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + tables() + "\n" + END + rest.partition(END)[2]


def _code(value: object) -> str:
    return f"`{value!r}`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
