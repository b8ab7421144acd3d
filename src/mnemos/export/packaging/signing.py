"""Signatures of packages, by the OpenSSF's model-signing library: a key signs the sums of all files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError, FormatError, MissingDependencyError
from mnemos.formats.package import SIGNATURE


def check_key(key: str | os.PathLike[str]) -> None:
    """ConfigError: there is no such file; MissingDependencyError: the library is not installed."""
    if not os.path.isfile(key):
        raise ConfigError(f"sign is {os.fspath(key)!r}, which is no file; expected a private EC key in PEM")
    _library()


def write_signature(folder: Path, key: str | os.PathLike[str]) -> None:
    """Writes model.sig with an elliptic curve's private key, a PEM file. ConfigError: it is none."""
    signing, _, hashing = _library()
    # Stated in the signature, so that whoever verifies it leaves out the signature itself.
    hashed = hashing.Config().set_ignored_paths(paths=[Path(SIGNATURE)], ignore_git_paths=False)
    config = signing.Config().set_hashing_config(hashed)
    try:
        config.use_elliptic_key_signer(private_key=Path(key)).sign(folder, folder / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"sign is {os.fspath(key)!r}: {error}; expected a private EC key in PEM") from error


def verify_signature(folder: str | os.PathLike[str], public_key: str | os.PathLike[str]) -> None:
    """FormatError unless model.sig is the signature of all files by this public key, a PEM file."""
    folder = Path(folder)
    if not (folder / SIGNATURE).is_file():
        raise FormatError(f"{folder / SIGNATURE}: is missing; the package is not signed")
    _, verifying, _ = _library()
    config = verifying.Config()
    try:
        config.use_elliptic_key_verifier(public_key=Path(public_key)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # whatever sigstore's layers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(f"{folder / SIGNATURE}: does not sign this package with that key: {reason}") from error


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingDependencyError(f"signatures need model-signing: pip install 'mnemos[sign]' ({error})") from error
    return signing, verifying, hashing
