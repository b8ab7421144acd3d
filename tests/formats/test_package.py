"""Packages that are not as they were made: every change to a file or to the list of files is an error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.package import is_package, read_package, sums_text


def write(folder: Path, files: dict[str, bytes], **fields: Any) -> Path:
    """A package that holds these files."""
    folder.mkdir(exist_ok=True)
    listed = {}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        listed[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    metadata = {"format": "mnemos-package", "version": 1, "kind": "gguf", "files": listed} | fields
    rewrite(folder, metadata)
    return folder


def rewrite(folder: Path, metadata: dict[str, Any]) -> None:
    """metadata.json, and the SHA256SUMS that belongs to it."""
    (folder / "metadata.json").write_text(json.dumps(metadata))
    sums = {name: entry["sha256"] for name, entry in metadata["files"].items() if isinstance(entry, dict)}
    sums["metadata.json"] = hashlib.sha256((folder / "metadata.json").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(sums_text(sums))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write(tmp_path / "package", {"model.gguf": b"weights", "exports/model.onnx": b"graph"})


def test_a_sound_package(package: Path) -> None:
    found = read_package(package)
    found.verify()
    assert is_package(package) and not is_package(package / "exports")
    assert found.kind == "gguf" and found.size == 12 and set(found.files) == {"model.gguf", "exports/model.onnx"}
    (package / "model.sig").write_text("a signature is not in the list: it is made of it")
    assert read_package(package).digest == found.digest


def test_every_byte_counts(package: Path) -> None:
    for name in ("model.gguf", "exports/model.onnx", "metadata.json", "SHA256SUMS"):
        content = (package / name).read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1
            (package / name).write_bytes(changed)
            with pytest.raises((FormatError, UnsupportedError)):
                read_package(package).verify()
        (package / name).write_bytes(content)
    read_package(package).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "model.gguf").unlink(), "model.gguf: is missing; metadata.json lists it"),
        (
            lambda p: (p / "more.bin").touch(),
            "more.bin: does not belong to the package: metadata.json does not list it",
        ),
        (lambda p: (p / "exports" / "x").touch(), "exports/x: does not belong to the package"),
        (lambda p: (p / "model.gguf").write_bytes(b"weight"), "has 6 bytes; the package was made with 7"),
        (lambda p: (p / "SHA256SUMS").unlink(), "SHA256SUMS: is missing"),
        (lambda p: (p / "SHA256SUMS").write_bytes(b"\xff"), "SHA256SUMS: is not ASCII"),
        (lambda p: (p / "SHA256SUMS").write_text("abc  model.gguf\n"), "line 'abc  model.gguf'; expected a SHA-256"),
        (lambda p: (p / "SHA256SUMS").write_text(""), "disagrees with metadata.json about 'model.gguf'"),
        (lambda p: (p / "metadata.json").write_bytes(b" " * (17 << 20)), "has 17825792 bytes; a JSON file may have"),
        (lambda p: (p / "metadata.json").write_text("[" * 100_000), "nested too deeply"),
    ],
)
def test_changed_folders(package: Path, change: Callable[[Path], Any], message: str) -> None:
    change(package)
    with pytest.raises(FormatError, match=message):
        read_package(package)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_links_and_devices_are_not_followed(package: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"weights")
    (package / "model.gguf").unlink()
    (package / "model.gguf").symlink_to(outside)
    with pytest.raises(FormatError, match="model.gguf: is a link; a package holds plain files and follows no link"):
        read_package(package)
    (package / "model.gguf").unlink()
    os.mkfifo(package / "model.gguf")
    with pytest.raises(FormatError, match="model.gguf: is neither a file nor a folder"):
        read_package(package)
    (package / "model.gguf").unlink()
    (package / "model.gguf").write_bytes(b"weights")
    (package / "more").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="more: is a link"):
        read_package(package)


@pytest.mark.parametrize(
    "name",
    ["../model", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\\b", "C:x", "a\nb", "", "a/", "./a", "x" * 300,
     "\u00e9", "a./b", "metadata.json", "Model.gguf", "/".join("abcdefghi")],
)  # fmt: skip
def test_names_that_lead_elsewhere(package: Path, name: str) -> None:
    metadata = json.loads((package / "metadata.json").read_text())
    metadata["files"][name] = metadata["files"]["model.gguf"]
    (package / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match="has a name that a package may not hold|is listed twice, or is one of"):
        read_package(package)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version is 2; this release reads up to 1: update mnemos"),
        ({"version": "1"}, "version is '1'; expected a number from 1"),
        ({"kind": "other"}, "kind is 'other'; expected one of gguf, huggingface"),
        ({"files": []}, "files is \\[\\]; expected 1 to 10000 files"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "file 'a' is .*; expected its size and sha256"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "file 'a' is .*; expected its size and sha256"),
        ({"files": {"a": {"size": True, "sha256": "0" * 64}}}, "file 'a' is .*; expected its size and sha256"),
    ],
)
def test_what_metadata_may_not_say(package: Path, fields: dict[str, Any], message: str) -> None:
    metadata = json.loads((package / "metadata.json").read_text())
    (package / "metadata.json").write_text(json.dumps(metadata | fields))
    with pytest.raises((FormatError, UnsupportedError), match=message):
        read_package(package)


@pytest.mark.parametrize("change", [{"prompt": []}, {"tokens": [-1]}, {"logits": [1, 2]}, {"spread": None}])
def test_fingerprints_are_checked_before_they_are_used(tmp_path: Path, change: dict[str, Any]) -> None:
    sound = {"prompt": [1, 2], "tokens": [3], "logits": [0.5], "spread": 2.0}
    for fields, is_sound in ((sound, True), (sound | change, False)):
        folder = write(tmp_path / str(is_sound), {"model.gguf": b"x"}, fingerprint=fields)
        if is_sound:
            assert read_package(folder).first_logits is not None
        else:
            with pytest.raises(FormatError, match="fingerprint is .*; expected prompt, tokens, logits and spread"):
                _ = read_package(folder).first_logits
