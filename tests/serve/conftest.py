"""The real model behind a server, shared by all tests of the server that want sensible text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from tests.serve.running import running


@pytest.fixture(scope="session")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(str(smollm2), context_length=2048) as engine:
        yield engine


@pytest.fixture(scope="session")
def client(engine: InferenceEngine) -> Iterator[httpx.Client]:
    with running(app(engine, name="smollm2")) as client:
        yield client
