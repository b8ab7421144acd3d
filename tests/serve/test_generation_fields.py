"""The description of the settings: complete, plain JSON, with the limits that the checks have."""

from __future__ import annotations

import json

import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.fields import FIELDS
from mnemos.errors import ConfigError
from mnemos.serve.generation import RESERVED
from mnemos.serve.generation_fields import generation_fields

DESCRIBED = {field["name"]: field for field in generation_fields()}


def test_all_fields_that_a_request_may_set_are_described() -> None:
    assert [field.name for field in FIELDS if field.name not in RESERVED] == list(DESCRIBED)


def test_the_description_is_plain_json() -> None:
    assert json.loads(json.dumps(generation_fields(), allow_nan=False)) == generation_fields()


def test_choices_and_limits_are_those_of_the_rules() -> None:
    assert DESCRIBED["overflow"]["choices"] == ["error", "truncate_left", "sliding"]
    assert (DESCRIBED["min_p"]["minimum"], DESCRIBED["min_p"]["maximum"]) == (0, 1)
    assert (DESCRIBED["num_beams"]["minimum"], DESCRIBED["num_beams"]["maximum"]) == (1, 256)
    assert DESCRIBED["stop"]["item"] == "text"


@pytest.mark.parametrize("name", [name for name, field in DESCRIBED.items() if field["kind"] in ("integer", "number")])
def test_a_number_beyond_its_limits_is_refused(name: str) -> None:
    field = DESCRIBED[name]
    assert field["minimum"] is not None and field["maximum"] is not None, f"{name} has no limits"
    for value in (field["minimum"] - 3, field["maximum"] + 2):  # -1 means something in some fields
        with pytest.raises(ConfigError, match=name):
            GenerationConfig(**{name: value})
