"""Reading TOML on every Python that is supported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(content: str, path: Path) -> dict[str, Any]:
    """A TOML document. ConfigError with the place of a mistake."""
    try:
        found: dict[str, Any] = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found
