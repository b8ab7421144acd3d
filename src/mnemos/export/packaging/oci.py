"""A package as an OCI image layout: what registries of container images store, after the ModelPack specification.

See https://github.com/modelpack/model-spec: a manifest of artifact type `application/vnd.cncf.model.manifest.v1+json`
with a layer for each file, as it is. `oras copy --from-oci-layout DIR:latest REGISTRY/NAME:TAG` pushes it, and pulling
gives the package's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.export.packaging.staging import staging
from mnemos.formats.package import METADATA, SIGNATURE, SUMS, Package, sha256_of
from mnemos.formats.package_oci import ARTIFACT, FILE_PATH, LAYOUT
from mnemos.formats.package_oci import INDEX as INDEX_NAME

CONFIG = "application/vnd.cncf.model.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
_WEIGHTS = (".safetensors", ".gguf", ".pt", ".pt2", ".onnx", ".data", ".xml", ".bin")


def write_oci(package: Package, path: str | os.PathLike[str], *, tag: str = "latest", overwrite: bool = False) -> str:
    """Writes the layout to the new folder `path`; returns the manifest's digest, `sha256:...`.

    The same package gives the same bytes. Errors: those of `mnemos.export.packaging.staging.staging`.
    """
    with staging(Path(path), overwrite) as work:
        blobs = work / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        layers = [_layer(package, name, blobs) for name in _names(package)]
        config = _described(_config(package.metadata, layers), CONFIG, blobs)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": config,
            "layers": layers,
            "annotations": {
                "org.opencontainers.image.title": str(package.metadata.get("name")),
                "org.opencontainers.image.created": str(package.metadata.get("created_at")),
            },
        }
        entry = _described(manifest, MANIFEST, blobs)
        named = {**entry, "artifactType": ARTIFACT, "annotations": {"org.opencontainers.image.ref.name": tag}}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]}
        (work / INDEX_NAME).write_bytes(_bytes(index))
        (work / LAYOUT).write_bytes(_bytes({"imageLayoutVersion": "1.0.0"}))
    return str(entry["digest"])


def _names(package: Package) -> list[str]:
    own = [METADATA, SUMS, *([SIGNATURE] if (package.path / SIGNATURE).is_file() else [])]
    return sorted([*package.files, *own])


def _layer(package: Package, name: str, blobs: Path) -> dict[str, Any]:
    """Copies a file to the blobs; its descriptor."""
    source = package.path / name
    digest = package.sums[name] if name in package.sums else sha256_of(source)
    shutil.copyfile(source, blobs / digest)
    part = "weight" if name.endswith(_WEIGHTS) else "doc" if name == "README.md" or "LICEN" in name else "weight.config"
    return {
        "mediaType": f"application/vnd.cncf.model.{part}.v1.raw",
        "digest": f"sha256:{digest}",
        "size": source.stat().st_size,
        "annotations": {FILE_PATH: name, "org.opencontainers.image.title": name},
    }


def _config(metadata: Mapping[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    descriptor = {"createdAt": metadata.get("created_at"), "name": metadata.get("name")}
    licence = metadata.get("licence")
    return {
        "descriptor": {**descriptor, **({"licenses": [licence]} if licence else {})},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
        "config": {
            "architecture": str(metadata.get("model_class")),
            "format": "gguf" if metadata.get("kind") == "gguf" else "safetensors",
            "paramSize": str(metadata.get("parameters")),
            "precision": str(metadata.get("dtype")),
        },
    }


def _described(value: Mapping[str, Any], media_type: str, blobs: Path) -> dict[str, Any]:
    """Writes a JSON blob; its descriptor."""
    content = _bytes(value)
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
