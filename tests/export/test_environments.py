"""Environments of packages: made whole or not at all, used where this process's own packages do not fit."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from mnemos.errors import MissingDependencyError
from mnemos.export.environments import Environment

LOCAL = Environment("local", {"mnemos-test-local": "1.2"})


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own, and a package index of one wheel."""
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    about = "Metadata-Version: 2.1\nName: mnemos-test-local\nVersion: 1.2.3\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(tmp_path / "mnemos_test_local-1.2.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnemos_test_local.py", "answer = 42\n")
        wheel.writestr("mnemos_test_local-1.2.3.dist-info/METADATA", about)
        wheel.writestr("mnemos_test_local-1.2.3.dist-info/WHEEL", kind)
        wheel.writestr("mnemos_test_local-1.2.3.dist-info/RECORD", "")


def test_what_is_missing_and_the_command_that_makes_it_are_named() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        LOCAL.python(["mnemos-test-local"], "a test")
    message = str(caught.value)
    assert "a test needs mnemos-test-local 1.2, and here mnemos-test-local is not installed" in message
    assert message.endswith(f"run: {LOCAL.command()}") and "--make-environment" in message
    assert LOCAL.command().endswith("-m pip install 'mnemos-test-local==1.2.*'")


def test_packages_that_fit_here_need_no_environment() -> None:
    import numpy

    version = numpy.__version__.rpartition(".")[0]
    assert Environment("here", {"numpy": version}).python(["numpy"], "a test") == Path(sys.executable)
    with pytest.raises(MissingDependencyError, match=f"needs numpy 0.1, and here numpy is {numpy.__version__}"):
        Environment("old", {"numpy": "0.1"}).python(["numpy"], "a test")


@pytest.mark.slow
def test_an_environment_is_made_once_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    import subprocess

    python = LOCAL.python(["mnemos-test-local"], "a test", make=True)
    assert python.is_relative_to(tmp_path / "home")
    code = "import mnemos_test_local; print(mnemos_test_local.answer)"
    assert subprocess.run([python, "-I", "-c", code], capture_output=True, text=True).stdout == "42\n"
    (tmp_path / "mnemos_test_local-1.2.3-py3-none-any.whl").unlink()
    assert LOCAL.python(["mnemos-test-local"], "a test") == python
    with pytest.raises(MissingDependencyError, match="the environment of gone cannot be made: -m pip ended with 1"):
        Environment("gone", {"mnemos-test-local": "1.3"}).python(["mnemos-test-local"], "a test", make=True)
    assert [folder.name for folder in python.parents[2].iterdir()] == [LOCAL.folder.name]
