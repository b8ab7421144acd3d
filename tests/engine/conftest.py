"""Engines over the toy model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mnemos.engine.engine import InferenceEngine
from tests.engine.toys import ToyModel


@pytest.fixture
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), cache_tokens=4000) as made:
        yield made
