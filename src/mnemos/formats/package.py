"""A package: the folder of a model that travels, with a list of its files that says what each must hold.

`metadata.json` describes the model and lists every file with its size and SHA-256; `SHA256SUMS` repeats the sums for
other programs and adds that of metadata.json. So any byte that changes in any file is noticed. (Who may write all of
them can forge both: against that, a package is signed.)
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.contract import FirstLogits
from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.mapping import excerpt
from mnemos.formats.strict_json import MAX_BYTES, read_json_object

METADATA, SUMS, SIGNATURE = "metadata.json", "SHA256SUMS", "model.sig"
ADAPTER = "adapter"  # the folder of a LoRA adapter
FORMAT, VERSION = "mnemos-package", 1
MAX_FILES, MAX_NAME, MAX_DEPTH = 10_000, 200, 8
# What the weights are: files as other programs write them, or a module of the user's own.
CHECKPOINTS = ("gguf", "huggingface", "memory", "adapter")
MODULES = ("module", "quantized", "pruned")
# The public class whose `load` makes a module again, by the kind of the package.
READERS = {"quantized": "QuantizedModel", "pruned": "PrunedModel"}
KINDS = CHECKPOINTS + MODULES
_PIECE = 1 << 20
_PART = re.compile(r"[\w(][\w.+@,=()~ -]*", re.ASCII)
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class PackedFile:
    """size: in bytes; sha256: in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package whose files are those of its list, with the sizes that it says.

    path: its folder; metadata: the parsed metadata.json; files: by their names, with slashes, without metadata.json,
    SHA256SUMS and the signature; sums: those of SHA256SUMS, metadata.json's among them.
    """

    path: Path
    metadata: Mapping[str, Any]
    files: Mapping[str, PackedFile]
    sums: Mapping[str, str]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return str(self.metadata["kind"])

    @property
    def needs_class(self) -> bool:
        """Whether it is a module that only its author's class makes: of transformers' own, its file says how."""
        theirs = str(self.metadata.get("model_module")).startswith("transformers.models.")
        return self.kind == "module" or (self.kind in MODULES and not theirs)

    @property
    def changed_by(self) -> str | None:
        """The public class of Mnemos that makes the module again; None: it is no quantized or pruned module."""
        return READERS.get(self.kind)

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA adapter that belongs to the model."""
        return self.path / ADAPTER if self.kind == "adapter" else None

    @property
    def first_logits(self) -> FirstLogits | None:
        """The fingerprint: what the model answered when it was packed. FormatError: it is malformed."""
        stated = self.metadata.get("fingerprint")
        return None if stated is None else _read_fingerprint(stated, self.path / METADATA)

    @property
    def digest(self) -> str:
        """SHA-256 of what is packed, in hexadecimal: the same for the same files, whenever they were packed."""
        return digest_of(self.files)

    @property
    def size(self) -> int:
        """Bytes of the files in the list."""
        return sum(file.size for file in self.files.values())

    def verify(self) -> None:
        """Reads every file. FormatError names the first one that does not hold what the package was made with."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = dict(zip(self.sums, pool.map(lambda name: sha256_of(self.path / name), self.sums), strict=True))
        for name, expected in self.sums.items():
            if found[name] != expected:
                raise FormatError(
                    f"{self.path / name}: its SHA-256 is {found[name][:16]}..., the package was made with "
                    f"{expected[:16]}...: it was changed or damaged; get the package again"
                )


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that says that it is a package. FormatError: its metadata.json cannot be read."""
    file = Path(path) / METADATA
    return os.path.isfile(file) and read_json_object(file).get("format") == FORMAT


def read_package(folder: str | os.PathLike[str]) -> Package:
    """A package with its structure checked: only the files of its list, all of them, with their sizes, and no links.

    What they hold is `Package.verify`'s business. FormatError: something is missing, is there without being listed, is
    a link or a device, or has a name that leads out of the folder; UnsupportedError: a later version.
    """
    folder = Path(folder)
    there = dict(_walk(folder, "", 0))
    for name in (METADATA, SUMS):
        if name not in there:
            raise FormatError(f"{folder / name}: is missing; a package has it")
    metadata = read_json_object(folder / METADATA)
    files = check_metadata(metadata, folder / METADATA)
    sums = parse_sums(_read_small(folder / SUMS), folder / SUMS)
    check_sums(sums, files, folder / SUMS)
    check_names({name for name in there if name != SIGNATURE}, files, folder)
    for name, file in files.items():
        if there[name] != file.size:
            raise FormatError(
                f"{folder / name}: has {there[name]} bytes; the package was made with {file.size}: cut off or changed"
            )
    return Package(folder, metadata, files, sums)


def check_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, PackedFile]:
    """The list of files of a metadata.json, every field that Mnemos relies on checked; `path` is for errors."""
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path}: format is {excerpt(metadata.get('format'))}; a package says {FORMAT!r}")
    version = metadata.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path}: version is {excerpt(version)}; expected a number from 1")
    if version > VERSION:
        raise UnsupportedError(f"{path}: version is {version}; this release reads up to {VERSION}: update mnemos")
    if metadata.get("kind") not in KINDS:
        raise FormatError(f"{path}: kind is {excerpt(metadata.get('kind'))}; expected one of {', '.join(KINDS)}")
    listed = metadata.get("files")
    if not isinstance(listed, dict) or not 0 < len(listed) <= MAX_FILES:
        raise FormatError(f"{path}: files is {excerpt(listed)}; expected 1 to {MAX_FILES} files by their names")
    files: dict[str, PackedFile] = {}
    folded = {name.casefold() for name in (METADATA, SUMS, SIGNATURE)}
    for name, entry in listed.items():
        check_name(name, path)
        if name.casefold() in folded:
            raise FormatError(f"{path}: file {excerpt(name)} is listed twice, or is one of the package's own")
        folded.add(name.casefold())
        files[name] = _read_entry(name, entry, path)
    return files


def _read_entry(name: str, entry: Any, path: Path) -> PackedFile:
    if isinstance(entry, dict) and set(entry) == {"size", "sha256"}:
        size, digest = entry["size"], entry["sha256"]
        if type(size) is int and size >= 0 and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
            return PackedFile(size, digest)
    raise FormatError(f"{path}: file {excerpt(name)} is {excerpt(entry)}; expected its size and sha256")


def check_name(name: str, path: Path) -> None:
    """FormatError unless `name` is a plain relative one: letters, digits and a few marks, in up to MAX_DEPTH parts."""
    parts = name.split("/")
    plain = all(_PART.fullmatch(part) and part[-1] not in " ." for part in parts)
    if not plain or len(parts) > MAX_DEPTH or len(name) > MAX_NAME:
        raise FormatError(
            f"{path}: file {excerpt(name)} has a name that a package may not hold; expected a relative one of ASCII "
            f"letters, digits, '.', '_' and '-', in at most {MAX_DEPTH} parts, none of which begins with a dot"
        )


def check_sums(sums: Mapping[str, str], files: Mapping[str, PackedFile], path: Path) -> None:
    """FormatError unless SHA256SUMS, at `path`, says the same as metadata.json's list, and metadata.json's own sum."""
    listed = {name: file.sha256 for name, file in files.items()}
    stated = {name: digest for name, digest in sums.items() if name != METADATA}
    if stated != listed or METADATA not in sums:
        differing = [name for name in {**listed, **stated, METADATA: ""} if name not in sums] or [
            name for name in {**listed, **stated} if listed.get(name) != stated.get(name)
        ]
        raise FormatError(f"{path}: disagrees with {METADATA} about {excerpt(differing[0])}; one of them was changed")


def check_names(there: set[str], files: Mapping[str, PackedFile], folder: Path) -> None:
    """FormatError unless the files that are there, the signature aside, are the package's own and those listed."""
    expected = {METADATA, SUMS, *files}
    if missing := sorted(expected - there):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(f"{folder / missing[0]}: is missing{more}; {METADATA} lists it")
    if extra := sorted(there - expected):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise FormatError(f"{folder / extra[0]}: does not belong to the package{more}: {METADATA} does not list it")


def parse_sums(text: bytes, path: Path) -> dict[str, str]:
    """The sums of a SHA256SUMS file by the files' names; `path` is for errors."""
    sums: dict[str, str] = {}
    try:
        *lines, rest = text.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not ASCII; expected lines of a SHA-256, two spaces and a name") from error
    for line in [*lines, rest] if rest else lines:
        match = _SUM.fullmatch(line)
        if match is None or match[2] in sums:
            raise FormatError(f"{path}: line {excerpt(line)}; expected a SHA-256, two spaces and a name, once each")
        check_name(match[2], path)
        sums[match[2]] = match[1]
    return sums


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum -c` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def digest_of(files: Mapping[str, PackedFile]) -> str:
    """SHA-256 over the names and sums of files, in hexadecimal."""
    return hashlib.sha256(sums_text({name: file.sha256 for name, file in files.items()}).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal. FormatError: it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(_PIECE)
            view = memoryview(buffer)
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _read_fingerprint(stated: Any, path: Path) -> FirstLogits:
    fields = stated if isinstance(stated, dict) else {}
    prompt, tokens, logits = (fields.get(name) for name in ("prompt", "tokens", "logits"))
    if isinstance(prompt, list) and isinstance(tokens, list) and isinstance(logits, list):
        ids, values = [*prompt, *tokens], [*logits, fields.get("spread")]
        sound = all(type(token) is int and 0 <= token < 1 << 31 for token in ids) and prompt and tokens
        if sound and len(logits) == len(tokens) and all(type(value) is float for value in values):
            return FirstLogits(tuple(prompt), tuple(tokens), tuple(logits), fields["spread"])
    raise FormatError(f"{path}: fingerprint is {excerpt(stated)}; expected prompt, tokens, logits and spread")


def _read_small(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(f"{path}: has {size} bytes; it may have {MAX_BYTES}")
    return path.read_bytes()


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, int]]:
    """(name, size) of each file below `folder`. FormatError: a link, a device, or more than a package may hold."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be listed: {error.strerror or error}; expected a package") from error
    if len(entries) > MAX_FILES or depth >= MAX_DEPTH:
        raise FormatError(f"{folder}: holds more files, or more folders in folders, than a package may")
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", depth + 1)
        elif stat.S_ISREG(status.st_mode):
            yield prefix + entry.name, status.st_size
        else:
            what = "a link" if stat.S_ISLNK(status.st_mode) else "neither a file nor a folder"
            raise FormatError(f"{folder / entry.name}: is {what}; a package holds plain files and follows no link")
