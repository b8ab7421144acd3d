"""What `mnemos inspect` says about a package, all of whose files it verifies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.cli.terminal import human_bytes, human_count
from mnemos.formats.package import SIGNATURE, Package, read_package


@dataclass(frozen=True)
class PackageFacts:
    """path and digest of a package; bytes of its files; what its metadata.json says; signature: whether there is one,
    and "verified" if it was."""

    path: str
    name: str
    kind: str
    model_class: str
    licence: str
    parameters: int
    created_at: str
    made_with: str
    files: int
    bytes: int
    digest: str
    fingerprint: bool
    exports: list[str]
    signature: str


def examine_package(path: Path, public_key: str | None) -> tuple[Package, PackageFacts]:
    """Verifies a package, with a public key its signature too. FormatError: it is not as it was made."""
    package = read_package(path)
    package.verify()
    signed = (path / SIGNATURE).is_file()
    if public_key is not None:
        from mnemos.export.packaging.signing import verify_signature

        verify_signature(path, public_key)
    said: Any = package.metadata
    exports = said.get("exports") if isinstance(said.get("exports"), list) else []
    return package, PackageFacts(
        path=str(path),
        name=str(said.get("name")),
        kind=package.kind,
        model_class=str(said.get("model_class")),
        licence=str(said.get("licence") or "not stated"),
        parameters=said["parameters"] if type(said.get("parameters")) is int else 0,
        created_at=str(said.get("created_at")),
        made_with=f"mnemos {said.get('mnemos_version')}",
        files=len(package.files),
        bytes=package.size,
        digest=package.digest,
        fingerprint=package.first_logits is not None,
        exports=[str(one.get("format")) for one in exports if isinstance(one, dict)]
        if isinstance(exports, list)
        else [],
        signature="verified" if public_key is not None else "not verified: give --key" if signed else "none",
    )


def render_package(facts: PackageFacts) -> str:
    """The facts as human-readable lines."""
    rows = [
        ("package", f"{facts.path}: {facts.files} files, {human_bytes(facts.bytes)}, all as they were packed"),
        ("name", facts.name),
        ("model class", f"{facts.model_class}, {human_count(facts.parameters)} parameters"),
        ("licence", facts.licence),
        ("made", f"{facts.created_at} with {facts.made_with}"),
        ("fingerprint", "compared when the model is loaded" if facts.fingerprint else "none"),
        ("exports", ", ".join(facts.exports) or "none"),
        ("signature", facts.signature),
        ("sha256", facts.digest),
    ]
    return "\n".join(f"{name:<13}{value}" for name, value in rows)
