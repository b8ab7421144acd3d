"""Packages in OCI image layouts: read back as they were written, and refused if anything was changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemos.errors import FormatError, UnsupportedError
from mnemos.export.packaging.oci import write_oci
from mnemos.formats.package import read_package
from mnemos.formats.package_oci import is_oci_layout, peek_oci, unpack_oci
from tests.formats.test_package import write

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    package = write(tmp_path / "package", {"model.gguf": b"weights", "exports/model.onnx": b"graph"})
    (package / "model.sig").write_text("a signature")
    write_oci(read_package(package), tmp_path / "layout")
    return tmp_path / "layout"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "unpacked").mkdir()
    return tmp_path / "unpacked"


def changed(layout: Path, change: Change) -> None:
    """Rewrites the manifest, with an index that fits it."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    index["manifests"][0] |= {"digest": f"sha256:{digest}", "size": len(content)}
    (layout / "index.json").write_text(json.dumps(index))


def layer_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in manifest["layers"] if layer["annotations"]["org.cncf.model.filepath"] == name)


def test_there_and_back(layout: Path, tmp_path: Path, empty: Path) -> None:
    assert is_oci_layout(layout) and not is_oci_layout(tmp_path / "package")
    found = unpack_oci(layout, empty)
    original = tmp_path / "package"
    names = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(empty) for path in empty.rglob("*") if path.is_file())
    assert all((empty / name).read_bytes() == (original / name).read_bytes() for name in names)
    assert found.digest == read_package(original).digest
    assert peek_oci(layout) == hashlib.sha256((original / "SHA256SUMS").read_bytes()).hexdigest()


def test_a_changed_blob(layout: Path, empty: Path) -> None:
    blob = layout / "blobs" / "sha256" / hashlib.sha256(b"weights").hexdigest()
    blob.write_bytes(b"weighty")
    with pytest.raises(FormatError, match=f"{blob}: is not the 7 bytes that its name says"):
        unpack_oci(layout, empty)
    blob.unlink()
    shutil.rmtree(empty)
    empty.mkdir()
    with pytest.raises(FormatError, match=f"{blob}: is missing or no plain file"):
        unpack_oci(layout, empty)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda m: m.pop("artifactType"), UnsupportedError, "expected a package of Mnemos"),
        (lambda m: m.update(layers=[]), UnsupportedError, "SHA256SUMS missing"),
        (lambda m: m["layers"].append(m["layers"][0]), UnsupportedError, "twice"),
        (lambda m: m["layers"][0].update(mediaType="x.tar+gzip"), UnsupportedError, r"a layer is 'x.tar\+gzip'"),
        (lambda m: m["layers"][0].pop("annotations"), UnsupportedError, "with the file name None"),
        (lambda m: m["layers"][0].update(digest="md5:00"), FormatError, "expected a digest sha256"),
        (lambda m: m["layers"][0].update(size=-1), FormatError, "and a size"),
        (lambda m: layer_of(m, "model.gguf").update(size=8), FormatError, "is not the 8 bytes"),
        (lambda m: m["layers"].remove(layer_of(m, "model.gguf")), FormatError, "model.gguf: is missing"),
        (
            lambda m: layer_of(m, "model.gguf")["annotations"].update({"org.cncf.model.filepath": "../out"}),
            FormatError,
            "has a name that a package may not hold",
        ),
        (
            lambda m: layer_of(m, "model.gguf").update(digest=layer_of(m, "exports/model.onnx")["digest"], size=5),
            FormatError,
            "model.gguf: has 5 bytes",
        ),
    ],
)
def test_what_a_manifest_may_not_say(
    layout: Path, empty: Path, change: Change, error: type[Exception], message: str
) -> None:
    changed(layout, change)
    with pytest.raises(error, match=message):
        unpack_oci(layout, empty)
    assert not (empty.parent / "out").exists()


def test_other_bytes_of_the_same_size(layout: Path, empty: Path) -> None:
    """The manifest fits them, the package's list of sums does not."""
    digest = hashlib.sha256(b"weighty").hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(b"weighty")
    changed(layout, lambda m: layer_of(m, "model.gguf").update(digest=f"sha256:{digest}"))
    with pytest.raises(FormatError, match="model.gguf has another SHA-256 than it was packed with"):
        unpack_oci(layout, empty)


def test_several_manifests(layout: Path, empty: Path) -> None:
    index = json.loads((layout / "index.json").read_text())
    index["manifests"] *= 2
    (layout / "index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="manifests is 2; expected one"):
        unpack_oci(layout, empty)


def test_links_are_not_followed(layout: Path, empty: Path, tmp_path: Path) -> None:
    blob = layout / "blobs" / "sha256" / hashlib.sha256(b"weights").hexdigest()
    blob.unlink()
    blob.symlink_to(tmp_path / "package" / "model.gguf")
    with pytest.raises(FormatError, match="is missing or no plain file"):
        unpack_oci(layout, empty)
