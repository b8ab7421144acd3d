"""A wheel made on the spot, with a model of a few kilobytes in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

CONTENT = b"GGUF" + bytes(range(256)) * 64
MEMBER = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with these files in it."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def files_below(folder: Path) -> list[str]:
    """All files and folders under `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
