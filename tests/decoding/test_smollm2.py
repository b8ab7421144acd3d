"""The searches on a real model, in float32, against recorded results of Hugging Face transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine

DATA = Path(__file__).parents[1] / "data" / "smollm2"


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, dtype="float32", kv_dtype="float32") as engine:
        yield engine


def recorded(name: str) -> list[Any]:
    """Every recorded search; all but the first of each kind take too long for every run."""
    data = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    limits = {key: data["meta"][key] for key in ("max_new_tokens", "num_return_sequences", "eos_token_id")}
    return [
        pytest.param(
            {**limits, **data["configs"][item["config"]]},
            item,
            id=f"{name}-{item['id']}-{item['config']}",
            marks=[pytest.mark.slow] if number else [],
        )
        for number, item in enumerate(data["items"])
    ]


@pytest.mark.parametrize(("settings", "item"), recorded("beam") + recorded("diverse_beam") + recorded("contrastive"))
def test_searches_find_what_transformers_finds(engine, settings, item):
    choices = engine.complete(item["prompt_ids"], **settings).choices
    ours, theirs = [choice.token_ids for choice in choices], item["trimmed"]
    if item.get("min_score_gap", 1) < 1e-4:  # too close to a tie for the order to matter
        ours, theirs = sorted(ours), sorted(theirs)
    assert ours == theirs
    if "scores" in item:
        np.testing.assert_allclose([choice.score for choice in choices], item["scores"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "seed": 3}], ids=["greedy", "sampling"])
def test_drafts_leave_the_text_as_it_is(engine, settings):
    prompt = "Repeat the list.\nred, green, blue, white\nred, green, blue, white\nred, green,"
    plain = engine.complete(prompt, max_new_tokens=48, **settings)
    drafted = engine.complete(prompt, max_new_tokens=48, speculative="prompt_lookup", **settings)
    assert drafted.token_ids == plain.token_ids


@pytest.mark.slow
def test_json_on_a_real_vocabulary(engine):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    answer = engine.complete("The capital of France as JSON: ", json_schema=schema, max_new_tokens=60)
    assert set(json.loads(answer.text)) == {"city", "people"}
    assert engine.complete("Is water wet? ", choice=["yes", "no"]).text in ("yes", "no")
