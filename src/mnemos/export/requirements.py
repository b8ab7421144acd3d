"""Packages that an exporter needs, imported when it runs; one that is missing or too old is named."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mnemos.errors import MissingDependencyError
from mnemos.export.messages import first_line

# The oldest versions that work, as the extras in pyproject.toml have them.
OLDEST = {"torch": "2.6", "onnx": "1.17", "onnxscript": "0.3", "onnxruntime": "1.20", "openvino": "2025.0"}


def imported(package: str, extra: str, purpose: str) -> Any:
    """The module of a package of `OLDEST`, which has at least that version.

    MissingDependencyError names what is missing, or the version found and the one that works, and the command that
    installs it.
    """
    oldest, command = OLDEST[package], f"run: pip install 'mnemos[{extra}]'"
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise MissingDependencyError(f"{purpose} needs {package} {oldest} or newer; {command}") from error
    if _numbers(found) < _numbers(oldest):
        raise MissingDependencyError(
            f"{purpose} needs {package} {oldest} or newer, and {found} is installed; {command}"
        )
    try:
        return import_module(package)
    except Exception as error:  # a package whose own requirements do not fit fails in many ways
        raise MissingDependencyError(
            f"{purpose} needs {package}, and {package} {found} cannot be imported: {first_line(error)}; {command}"
        ) from error


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
