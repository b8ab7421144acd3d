"""Every RoPE scaling gives the logits of Hugging Face transformers, within the trained length and beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.errors import ConfigError, FormatError
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, context_in_use, read_rope
from tests.models.checkpoints import CONFIGS, Reference, build, token_ids
from tests.models.conftest import open_model
from tests.models.gguf_files import write_gguf
from tests.models.stepping import Session, whole

TRAINED = 40
_FACTORS = {
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": TRAINED, **_FACTORS},
}
POSITIONS = {"dynamic": TRAINED, "default": TRAINED}  # max_position_embeddings if not 4 * TRAINED


def _config(kind: str, model: str = "llama") -> Any:
    scaling = {"rope_theta": 10000.0} | SCALINGS[kind]
    positions = POSITIONS.get(kind, 4 * TRAINED)
    extra = {"original_max_position_embeddings": TRAINED} if model == "phi3" else {}
    changes = {"rope_parameters": scaling, "max_position_embeddings": positions, "sliding_window": None} | extra
    return type(CONFIGS[model]())(**(CONFIGS[model]().to_dict() | changes))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {kind: build(_config(kind), tmp_path_factory.mktemp(kind)) for kind in SCALINGS}


@pytest.mark.parametrize(
    ("kind", "length"),
    [(k, n) for k in SCALINGS for n in (20, TRAINED, TRAINED + 1, 3 * TRAINED) if k != "default" or n <= TRAINED],
)
def test_against_transformers(kind: str, length: int, backend: str, references: dict[str, Reference]) -> None:
    """If the table depends on the length, transformers chooses by the text, Mnemos by the context in use."""
    context = max(length, TRAINED) if kind in ("dynamic", "longrope") else None
    model = open_model(references[kind].folder, backend, context_length=context)
    ids = token_ids(length)
    np.testing.assert_allclose(whole(model, ids, [8, 3, 6, 1]), references[kind].logits(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_from_gguf(kind: str, backend: str, references: dict[str, Reference], tmp_path: Path) -> None:
    ids = token_ids(2 * TRAINED)
    model = open_model(write_gguf(references[kind].module, tmp_path / "model.gguf"), backend)
    np.testing.assert_allclose(whole(model, ids, [8, 3, 6]), references[kind].logits(ids), atol=1e-4)


@pytest.mark.parametrize("length", [TRAINED, 2 * TRAINED])
def test_phi3_longrope_from_both_formats(length: int, backend: str, tmp_path: Path) -> None:
    reference = build(_config("longrope", "phi3"), tmp_path / "folder")
    path = write_gguf(reference.module, tmp_path / "model.gguf")
    ids = token_ids(length)
    for source in (reference.folder, path):
        assert open_model(source, backend).spec.context_length == TRAINED
        model = open_model(source, backend, context_length=length)
        np.testing.assert_allclose(whole(model, ids, [8, 3, 6]), reference.logits(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_token_does_not_depend_on_how_long_the_text_became(kind: str, references: dict[str, Reference]) -> None:
    model = open_model(references[kind].folder, "numpy", context_length=3 * TRAINED)
    ids = token_ids(2 * TRAINED)
    at_once = whole(model, ids, [0, 1, 2])
    session = Session(model, [[5, 4, 7]])
    parts = [session.step({0: ids[:TRAINED]})[0], session.step({0: ids[TRAINED:]})[0]]
    np.testing.assert_allclose(np.concatenate(parts), at_once, atol=1e-5)


def _fields(context_length: int | None = None, **values: Any) -> Fields:
    return Fields("config.json", {"max_position_embeddings": 100} | values, context_length=context_length)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5000},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}},
    ],
)
def test_spellings_of_old_and_new_versions(scaling: dict[str, Any]) -> None:
    rope = read_rope(_fields(**scaling), 16, layer_type="full_attention")
    assert rope == Rope(5000.0, 16, "linear", factor=2.0, trained_length=100, context_length=100)


def test_the_oldest_phi3_files_call_longrope_su_or_yarn() -> None:
    for name in ("su", "yarn"):
        scaling = {"type": name, **_FACTORS}
        rope = read_rope(_fields(rope_scaling=scaling, original_max_position_embeddings=25), 16)
        assert (rope.kind, rope.trained_length, rope.context_length) == ("longrope", 25, 25)


@pytest.mark.parametrize(
    ("values", "own", "longest"),
    [
        ({}, 100, 100),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 100, 200),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 100, 400),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}}, 400, 400),
        ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 25, **_FACTORS}}, 25, 100),
    ],
)
def test_context_lengths(values: dict[str, Any], own: int, longest: int) -> None:
    assert context_in_use(_fields(**values)) == own
    assert context_in_use(_fields(longest, **values)) == longest
    for wrong in (longest + 1, 0, -1, True):
        with pytest.raises(ConfigError, match=f"context_length is {wrong}; this model takes 1 to {longest}"):
            context_in_use(_fields(wrong, **values))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "ntk-by-moon", "factor": 2.0}}, "type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "high_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}}, "long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}}, "short_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}}, "short_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}}, "original_max"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.125}, "dynamic"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.05}, "0 elements of each head are rotated"),
    ],
)
def test_bad_fields_are_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(FormatError, match=field):
        read_rope(_fields(**values), 16)
