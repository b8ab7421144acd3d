"""What all requests' bodies have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from mnemos.serve.generation import FIELDS


class Body(BaseModel):
    """A JSON body: types are not converted, null means that a field is absent, further fields are kept."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra=lambda schema: _add_fields(schema), protected_namespaces=()
    )

    def given(self, *names: str) -> dict[str, Any]:
        """The fields of these names that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def further(self) -> dict[str, Any]:
        """What is not among the declared fields."""
        return dict(self.model_extra or {})


def _add_fields(schema: dict[str, Any]) -> None:
    """The engine's own fields, which are checked where they are defined, in the API's description."""
    if "max_tokens" not in schema.get("properties", {}):
        return
    from mnemos.decoding.fields import FIELDS as ROWS

    for row in ROWS:
        if row.name in FIELDS:
            schema["properties"].setdefault(row.name, {"description": f"{row.help} Must be {row.rule.meaning}."})
