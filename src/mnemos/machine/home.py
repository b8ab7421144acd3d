"""Where Mnemos keeps its files."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home() -> Path:
    """The folder that Mnemos keeps its files in: $MNEMOS_HOME, or `mnemos` in the platform's own cache folder."""
    if chosen := os.environ.get("MNEMOS_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mnemos"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mnemos"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnemos"


def state() -> Path:
    """The folder for what must not be lost when caches are cleared: $MNEMOS_HOME, or the platform's own for that."""
    if os.environ.get("MNEMOS_HOME") or sys.platform == "win32":
        return home()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mnemos"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mnemos"
