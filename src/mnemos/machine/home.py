"""Where Mnemos keeps its files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mnemos.errors import ConfigError


def home() -> Path:
    """The folder that Mnemos keeps its files in: $MNEMOS_HOME, or `mnemos` in the platform's own cache folder.

    ConfigError where neither is known, as for a container's user that no account describes.
    """
    if chosen := os.environ.get("MNEMOS_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _user_home() / "AppData" / "Local") / "mnemos"
    if sys.platform == "darwin":
        return _user_home() / "Library" / "Caches" / "mnemos"
    return Path(os.environ.get("XDG_CACHE_HOME") or _user_home() / ".cache") / "mnemos"


def state() -> Path:
    """The folder for what must not be lost when caches are cleared: $MNEMOS_HOME, or the platform's own for that."""
    if os.environ.get("MNEMOS_HOME") or sys.platform == "win32":
        return home()
    if sys.platform == "darwin":
        return _user_home() / "Library" / "Application Support" / "mnemos"
    return Path(os.environ.get("XDG_STATE_HOME") or _user_home() / ".local" / "state") / "mnemos"


def _user_home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder (HOME is not set, and no account says it); set MNEMOS_HOME to a folder that "
            "Mnemos may write its models and sessions to"
        ) from None
