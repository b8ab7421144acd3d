"""A package in an OCI image layout, as registries of container images store it, read back.

`index.json` names a manifest after the ModelPack specification (https://github.com/modelpack/model-spec), which names a
blob for each file of the package by its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.mapping import excerpt
from mnemos.formats.package import MAX_FILES, SUMS, Package, check_name, read_package
from mnemos.formats.strict_json import read_json_object

Progress = Callable[[str, int, int], None]
LAYOUT, INDEX = "oci-layout", "index.json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
FILE_PATH = "org.cncf.model.filepath"  # the annotation with a file's name
_DIGEST = re.compile("sha256:([0-9a-f]{64})")
_PIECE = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A file of the package: sha256 in hexadecimal, size in bytes."""

    name: str
    sha256: str
    size: int


def is_oci_layout(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the folder of an OCI image layout."""
    return os.path.isfile(os.path.join(path, LAYOUT))


def peek_oci(path: Path) -> str:
    """The SHA-256 of the package's SHA256SUMS, which no other package shares; FormatError as `unpack_oci`."""
    return next(layer.sha256 for layer in _layers(path) if layer.name == SUMS)


def unpack_oci(path: Path, folder: Path, progress: Progress = lambda stage, done, total: None) -> Package:
    """Copies the package's files into an empty folder, each verified while it is read.

    FormatError: the layout is damaged, or holds several manifests; UnsupportedError: an image or a model that is no
    package of Mnemos.
    """
    layers = _layers(path)
    total, done = sum(layer.size for layer in layers), 0
    for layer in layers:
        progress("unpacking", done, total)
        _copy(_blob(path, layer.sha256), folder / layer.name, layer)
        done += layer.size
    progress("unpacking", total, total)
    package = read_package(folder)
    for layer in layers:
        if package.sums.get(layer.name, layer.sha256) != layer.sha256:
            raise FormatError(f"{path}: {layer.name} has another SHA-256 than it was packed with: changed or damaged")
    return package


def _layers(path: Path) -> list[Layer]:
    manifests = read_json_object(path / INDEX).get("manifests")
    if not isinstance(manifests, list) or len(manifests) != 1:
        found = len(manifests) if isinstance(manifests, list) else excerpt(manifests)
        raise FormatError(f"{path / INDEX}: manifests is {found}; expected one: copy the wanted one to its own layout")
    name = _descriptor(manifests[0], path / INDEX)[0]
    manifest = _read_manifest(_blob(path, name), name)
    listed = manifest.get("layers")
    if manifest.get("artifactType") != ARTIFACT or not isinstance(listed, list) or len(listed) > MAX_FILES:
        raise UnsupportedError(
            f"{path}: holds {excerpt(manifest.get('artifactType') or manifest.get('mediaType'))}; expected a package "
            f"of Mnemos ({ARTIFACT})"
        )
    layers = [_layer(entry, path) for entry in listed]
    names = {layer.name for layer in layers}
    if SUMS not in names or len(names) != len(layers):
        raise UnsupportedError(
            f"{path}: is a model with {SUMS} {'twice or another file twice' if SUMS in names else 'missing'}; expected "
            "a package of Mnemos: unpack others with their own tool, and load the folder"
        )
    return layers


def _layer(entry: Any, path: Path) -> Layer:
    digest, size = _descriptor(entry, path)
    annotations = entry.get("annotations")
    name = annotations.get(FILE_PATH) if isinstance(annotations, Mapping) else None
    if not isinstance(name, str) or not str(entry.get("mediaType")).endswith(".raw"):
        raise UnsupportedError(
            f"{path}: a layer is {excerpt(entry.get('mediaType'))} with the file name {excerpt(name)}; expected files "
            "as they are (.raw), as in a package of Mnemos"
        )
    check_name(name, path)
    return Layer(name, digest, size)


def _descriptor(entry: Any, path: Path) -> tuple[str, int]:
    """The SHA-256 and the size that a descriptor states."""
    fields = entry if isinstance(entry, Mapping) else {}
    match, size = _DIGEST.fullmatch(str(fields.get("digest"))), fields.get("size")
    if match is None or type(size) is not int or size < 0:
        raise FormatError(f"{path}: descriptor is {excerpt(entry)}; expected a digest sha256:... and a size")
    return match[1], size


def _read_manifest(file: Path, digest: str) -> dict[str, Any]:
    value = read_json_object(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise FormatError(f"{file}: has another SHA-256 than its name says: it was changed or damaged")
    return value


def _blob(path: Path, digest: str) -> Path:
    """A blob's file. FormatError: it is missing, or a link."""
    file = path / "blobs" / "sha256" / digest
    if file.is_symlink() or not file.is_file():
        raise FormatError(f"{file}: is missing or no plain file; the manifest names it")
    return file


def _copy(source: Path, target: Path, layer: Layer) -> None:
    digest, size = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as content, target.open("xb") as file:
            while piece := content.read(_PIECE):
                digest.update(piece)
                file.write(piece)
            size = file.tell()
    except OSError as error:
        raise FormatError(f"{source}: cannot be unpacked: {error.strerror or error}") from error
    if size != layer.size or digest.hexdigest() != layer.sha256:
        raise FormatError(f"{source}: is not the {layer.size} bytes that its name says: it was changed or damaged")
