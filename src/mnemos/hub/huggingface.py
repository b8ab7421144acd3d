"""Models on the Hugging Face hub, through huggingface_hub (the extra `hub`)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from mnemos.errors import ConfigError, DownloadError, MissingDependencyError
from mnemos.hub.cache import Progress, check_room

# What a folder of safetensors needs to be loaded; nothing that could hold code.
_FOLDER_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.spm", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*")
_REFERENCE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::(.+))?")


@dataclass(frozen=True)
class HubReference:
    """`hf:org/name` or `hf:org/name:file`."""

    repository: str
    file: str | None

    @property
    def name(self) -> str:
        return f"hf:{self.repository}"


def parse(reference: str) -> HubReference:
    """ConfigError for all but hf:org/name and hf:org/name:file, and for a file outside the model's folder."""
    match = _REFERENCE.fullmatch(reference)
    if match is None or ".." in match[1]:
        raise ConfigError(f"model reference {reference!r} must look like hf:org/name or hf:org/name:file")
    file = match[2]
    if file is not None and (PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file):
        raise ConfigError(f"file {file!r} in model reference {reference!r} must be a path inside the repository")
    return HubReference(match[1], file)


def fetch(reference: HubReference, folder: Path, progress: Progress) -> None:
    """Puts the repository's model files, or the one that was named, into `folder`."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(f"{reference.name} needs huggingface_hub: pip install 'mnemos[hub]'") from error
    with _errors_named(reference, huggingface_hub):
        info = huggingface_hub.HfApi().model_info(reference.repository, files_metadata=True)
    sizes = _files(info, reference)
    check_room(folder, sum(sizes.values()))
    done = 0
    for name, size in sizes.items():
        progress(f"downloading {name}", done, sum(sizes.values()))
        with _errors_named(reference, huggingface_hub):
            huggingface_hub.hf_hub_download(reference.repository, name, local_dir=folder)
        done += size
    progress("downloading", done, done)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes for resuming


@contextmanager
def _errors_named(reference: HubReference, huggingface_hub: Any) -> Iterator[None]:
    """Around a call of the library: what goes wrong on the network or at the hub is a DownloadError."""
    try:
        yield
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise DownloadError(f"cannot fetch {reference.name}: {' '.join(str(error).split())}") from error
    except Exception as error:  # those of the network libraries are of many modules, none ours to import
        own = type(error).__module__ == "builtins" and not isinstance(error, (ConnectionError, TimeoutError))
        if own:  # of the disk, which the caller names, or a defect
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DownloadError(
            f"cannot fetch {reference.name}: no connection to the hub ({problem}); try again with a network, or give "
            "the path of a folder that holds the model"
        ) from error


def _files(info: Any, reference: HubReference) -> dict[str, int]:
    """Names and sizes of the files to fetch, of those that the hub says there are."""
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    if reference.file is not None:
        if reference.file not in sizes:
            raise DownloadError(f"{reference.name} has no file {reference.file!r}; it has {_listing(sizes)}")
        return {reference.file: sizes[reference.file]}
    wanted = {name: size for name, size in sizes.items() if _belongs_to_folder(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        ggufs = ", ".join(f"{reference.name}:{name}" for name in sorted(sizes) if name.endswith(".gguf"))
        hint = f"name one of its GGUF files: {ggufs}" if ggufs else f"it has {_listing(sizes)}"
        raise DownloadError(f"{reference.name} has no safetensors files; {hint}")
    return wanted


def _belongs_to_folder(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _FOLDER_PATTERNS)


def _listing(sizes: dict[str, int]) -> str:
    return ", ".join(sorted(sizes)) or "no files"
