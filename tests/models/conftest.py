"""Fixtures shared by the tests of models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import LoadedModel, load_model
from tests.gpu import CUDA_BACKEND
from tests.models.checkpoints import CONFIGS, Reference, build

PAGES = 24
HAS_NATIVE = importlib.util.find_spec("mnemos._native") is not None


@pytest.fixture(
    scope="session",
    params=[
        "numpy",
        pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")),
        CUDA_BACKEND,
    ],
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """The reference model for a name in CONFIGS, created and saved once."""
    return cache(lambda name: build(CONFIGS[name](), tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def load(reference: Callable[[str], Reference]) -> Callable[..., LoadedModel]:
    """A float32 model of a reference's folder with room for PAGES pages, loaded once per backend."""

    @cache
    def loaded(name: str, backend: str) -> LoadedModel:
        return open_model(reference(name).folder, backend)

    return loaded


def open_model(path: Any, backend: str, **options: Any) -> LoadedModel:
    model = load_model(open_checkpoint(path), backend=backend, **({"dtype": "float32"} | options))
    model.reserve(PAGES)
    return model
