"""Where Mnemos keeps its files, for users whom the system knows and for those it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mnemos.errors import ConfigError
from mnemos.machine.home import home, state


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom no account describes, as in a container that runs under any number."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MNEMOS_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)


def test_a_user_without_a_home_folder_is_told_what_to_set(homeless: None) -> None:
    for folder in (home, state):
        with pytest.raises(ConfigError, match="no home folder .*; set MNEMOS_HOME to a folder"):
            folder()


def test_a_user_without_a_home_folder_can_load_a_model() -> None:
    """The fastest kernels are measured, and the measurement is not kept. In a process of its own: once is for all."""
    code = (
        "import os, pathlib\n"
        "def unknown(*_): raise RuntimeError\n"
        "pathlib.Path.home = unknown\n"
        "for name in ('MNEMOS_HOME', 'XDG_CACHE_HOME', 'LOCALAPPDATA', 'MNEMOS_ISA'): os.environ.pop(name, None)\n"
        "from mnemos.machine.levels import settle_levels\n"
        "settle_levels()\n"
        "print('settled')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "settled\n"


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    assert home() == state() == tmp_path
