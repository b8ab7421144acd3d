"""Packages in one file, unpacked into the models folder once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemos.errors import FormatError
from mnemos.export.packaging.oci import write_oci
from mnemos.formats.package import is_package, read_package
from mnemos.formats.package_tar import write_tar
from mnemos.hub import cache
from mnemos.hub.sources import resolve
from tests.formats.test_package import write


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path / "home"))
    write_tar(read_package(write(tmp_path / "package", {"model.gguf": b"weights"})), tmp_path / "small.tar")
    return tmp_path / "small.tar"


def test_a_package_is_unpacked_once_and_has_a_name(archive: Path) -> None:
    folder = resolve(archive)
    assert (
        is_package(folder) and folder.name.startswith("small@") and (folder / "model.gguf").read_bytes() == b"weights"
    )
    made = folder.stat().st_ino
    assert resolve(archive) == folder and folder.stat().st_ino == made
    archive.unlink()
    assert resolve("small") == folder == resolve(folder.name)
    assert [model.name for model in cache.cached_models()] == [folder.name]
    cache.remove(folder.name)
    with pytest.raises(FormatError, match="there is no model 'small'"):
        resolve("small")


def test_an_image_layout_is_unpacked_as_its_package(archive: Path, tmp_path: Path) -> None:
    package = read_package(tmp_path / "package")
    write_oci(package, tmp_path / "small.oci")
    folder = resolve(tmp_path / "small.oci")
    assert folder == resolve(archive) == resolve("small")  # the same package, in whatever form it came
    assert read_package(folder).digest == package.digest


def test_another_package_of_the_same_name_is_another_one(archive: Path, tmp_path: Path) -> None:
    first = resolve(archive)
    write_tar(read_package(write(tmp_path / "package", {"model.gguf": b"others!"})), archive)
    assert resolve(archive) != first
    with pytest.raises(FormatError, match="'small' is the name of several packages; give one of small@"):
        resolve("small")


def test_nothing_is_left_of_a_damaged_one(archive: Path) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"weights", b"weighty"))
    with pytest.raises(FormatError, match="another SHA-256"):
        resolve(archive)
    assert cache.cached_models() == []
    assert not [path for path in cache.models_folder().rglob("*") if path.is_file() and path.suffix != ".lock"]
