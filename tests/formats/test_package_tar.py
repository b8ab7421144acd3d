"""Packages as one file, and files that are no such thing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mnemos.errors import FormatError
from mnemos.formats.package import read_package
from mnemos.formats.package_tar import is_package_tar, peek_tar, unpack_tar, write_tar
from tests.formats.test_package import write


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {"model.gguf": b"weights" * 1000, "exports/model.onnx": b"graph"}
    return write(tmp_path / "package", files, created_at="2024-01-01T12:00:00+00:00")


def rebuilt(path: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """The .tar with its entries changed."""
    with tarfile.open(path) as archive:
        entries = [(entry, archive.extractfile(entry).read()) for entry in archive]  # type: ignore[union-attr]
    change(entries)
    target = path.with_name("changed.tar")
    with tarfile.open(target, "w") as archive:
        for entry, content in entries:
            entry.size = len(content) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(content))
    return target


def entry(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "/etc/passwd"
    return made, content


def test_there_and_back(package: Path, tmp_path: Path) -> None:
    write_tar(read_package(package), tmp_path / "p.tar")
    assert is_package_tar(tmp_path / "p.tar") and not is_package_tar(package)
    (tmp_path / "out").mkdir()
    found = unpack_tar(tmp_path / "p.tar", tmp_path / "out")
    assert found.digest == read_package(package).digest
    assert (tmp_path / "out" / "exports" / "model.onnx").read_bytes() == b"graph"
    assert peek_tar(tmp_path / "p.tar")[0]["kind"] == "gguf"
    with tarfile.open(tmp_path / "p.tar") as archive:
        first = archive.next()
        assert first is not None and first.name == "metadata.json" and first.mtime == 1704110400 and first.uid == 0


def test_the_same_package_is_the_same_file(package: Path, tmp_path: Path) -> None:
    write_tar(read_package(package), tmp_path / "a.tar")
    for file in package.rglob("*"):
        file.touch()
    write_tar(read_package(package), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.reverse(), "where metadata.json is expected; a package begins with it"),
        (lambda e: e.append(entry("../outside")), "'../outside' does not belong to the package"),
        (lambda e: e.append(entry("/outside")), "'/outside' does not belong to the package"),
        (lambda e: e.append(entry("model.gguf")), "'model.gguf' does not belong to the package, or is there twice"),
        (lambda e: e.append(entry("link", tarfile.SYMTYPE)), "'link' is no plain file"),
        (lambda e: e.append(entry("link", tarfile.LNKTYPE)), "'link' is no plain file"),
        (lambda e: e.append(entry("folder", tarfile.DIRTYPE)), "'folder' is no plain file"),
        (lambda e: e.append(entry("device", tarfile.CHRTYPE)), "'device' is no plain file"),
        (lambda e: e.insert(0, entry("metadata.json", tarfile.SYMTYPE)), "'metadata.json' is no plain file"),
        (lambda e: e.pop(), "is missing; metadata.json lists it"),
        (lambda e: e.__setitem__(-1, (e[-1][0], b"W" + e[-1][1][1:])), "has another SHA-256 than it was packed with"),
        (lambda e: e.__setitem__(-1, (e[-1][0], e[-1][1][1:])), "has 6999 bytes; it was packed with 7000"),
        (lambda e: e.__setitem__(0, (e[0][0], e[0][1] + b" ")), "metadata.json has another SHA-256 than SHA256SUMS"),
        (lambda e: e.__setitem__(0, (e[0][0], b"[" * (17 << 20))), "'metadata.json' has 17825792 bytes; it may have"),
        (lambda e: e.append(entry("model.sig", content=b" " * (17 << 20))), "'model.sig' has 17825792 bytes"),
    ],
)  # fmt: skip
def test_what_a_tar_may_not_hold(package: Path, tmp_path: Path, change: Callable[..., None], message: str) -> None:
    write_tar(read_package(package), tmp_path / "p.tar")
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match=message):
        unpack_tar(rebuilt(tmp_path / "p.tar", change), tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_damaged_files(package: Path, tmp_path: Path) -> None:
    write_tar(read_package(package), tmp_path / "p.tar")
    content = (tmp_path / "p.tar").read_bytes()
    for number, changed in enumerate(
        (b"", b"not a tar" * 100, content[:600], content[:4096], content[:100] + content[300:])
    ):
        (tmp_path / "damaged.tar").write_bytes(changed)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(FormatError):
            unpack_tar(tmp_path / "damaged.tar", tmp_path / str(number))
