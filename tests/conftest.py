"""Shared by all tests: the real model, and property tests that run the same way everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one of a process per core: before anything imports NumPy or PyTorch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from mnemos.errors import DownloadError
from mnemos.hub.sources import resolve

# Derandomized: a test that passed once passes again. `--hypothesis-profile=search` looks for new examples.
settings.register_profile("steady", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-torch", action="store_true", help="as on a machine without PyTorch; much quicker")
    parser.addoption("--one-level", action="store_true", help="test the fastest level of kernels, not every one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-torch"):
        sys.modules["torch"] = None  # type: ignore[assignment]  # what importing it then raises is an ImportError


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sessions that tests and documents open under the usual names are not those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into the user's model cache."""
    try:
        return resolve("smollm2-135m")
    except DownloadError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had: {error}")
