"""The table of fields: complete, and consistent with the dataclass and the documents."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.fields import ALIASES, FIELDS, GROUPS, ONLY
from mnemos.errors import ConfigError


def test_the_dataclass_has_the_tables_fields_with_their_defaults_in_its_order():
    assert [(field.name, field.default) for field in fields(GenerationConfig)] == [
        (field.name, field.default) for field in FIELDS
    ]
    parameters = GenerationConfig.__dataclass_fields__
    assert set(parameters) == {field.name for field in FIELDS} | set(ALIASES)
    assert all(parameters[field.name].default is not MISSING for field in FIELDS)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_row_holds_together(field):
    assert field.group in GROUPS
    assert not field.only or field.only in ONLY
    assert field.help.endswith(".") and field.help[0].isupper()
    assert field.name in GenerationConfig.__doc__
    for value in (*field.neutral, *field.habitual, *([] if field.default is None else [field.default])):
        assert field.rule.check(value) == value
        assert field.normal(value) == value
    for given, meant in field.means:
        assert field.normal(given) == (field.default if meant is None else meant)
    for other in FIELDS:
        assert not {field.name, field.alias} & set(other.elsewhere)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_another_librarys_name_is_answered_by_this_ones(field):
    for name in field.elsewhere:
        with pytest.raises(ConfigError, match=f"{name} is not a field .* it is called {field.name} here"):
            GenerationConfig(**{name: 1})


def test_the_document_has_the_tables():
    documenting = pytest.importorskip("tools.document_fields")
    text = documenting.DOCUMENT.read_text(encoding="utf-8")
    assert documenting.document(text) == text, "run `python tools/document_fields.py`"
