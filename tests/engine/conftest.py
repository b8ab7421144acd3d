"""Engines over the toy model, and a folder with a small Llama for long texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemos.engine.engine import InferenceEngine
from tests.engine.toys import ToyModel


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), cache_tokens=4000) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a context of 512 positions."""
    from tests.models.checkpoints import CONFIGS, build  # needs transformers

    config = CONFIGS["llama"]()
    config.max_position_embeddings = 512
    folder = tmp_path_factory.mktemp("llama")
    build(config, folder)
    return folder


@pytest.fixture(scope="module")
def no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured once for each model is measured anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNEMOS_HOME", str(tmp_path_factory.mktemp("home")))
        yield
