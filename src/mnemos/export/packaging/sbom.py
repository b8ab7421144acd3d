"""A bill of materials of a package: CycloneDX 1.6, with the model, its files and what it was made with."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.export.packaging.files import write_json
from mnemos.formats.package import PackedFile, digest_of
from mnemos.version import __version__

NAME = "sbom.cdx.json"
_SPDX = re.compile(r"[A-Za-z0-9.+-]+")


def write_sbom(folder: Path, facts: Mapping[str, Any], files: Mapping[str, PackedFile]) -> None:
    """Writes sbom.cdx.json about these files; the serial number is a function of them."""
    digest = digest_of(files)
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": facts["name"],
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer" if facts["kind"] not in ("module", "quantized") else "module",
                "modelArchitecture": facts["model_class"],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            }
        },
        "properties": [
            {"name": "mnemos:parameters", "value": str(facts["parameters"])},
            {"name": "mnemos:dtype", "value": str(facts["dtype"])},
        ],
    }
    if facts.get("licence"):
        model["licenses"] = [{"license": {"name": str(facts["licence"])}}]
    listed = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name,
         "hashes": [{"alg": "SHA-256", "content": file.sha256}]}
        for name, file in sorted(files.items())
    ]  # fmt: skip
    libraries = [("mnemos", __version__), ("torch", facts.get("torch_version"))]
    used = [
        {"type": "library", "bom-ref": f"library:{name}", "name": name, "version": version, "scope": "optional"}
        for name, version in libraries
        if version
    ]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(hex=digest[:32], version=5)}",
        "version": 1,
        "metadata": {
            "timestamp": facts["created_at"],
            "tools": {"components": [{"type": "application", "name": "mnemos", "version": __version__}]},
            "component": model,
        },
        "components": [*listed, *used],
        "dependencies": [{"ref": "model", "dependsOn": [entry["bom-ref"] for entry in listed]}],
    }
    write_json(folder / NAME, bom)
