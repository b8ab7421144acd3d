"""Tokenizers in packages: written as files that say all, and read without running anything."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError, FormatError
from mnemos.export.packaging.files import TOKENIZER_FILES, copy_tokenizer
from mnemos.export.packaging.own_tokenizers import equivalent_file
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.package import Package
from mnemos.formats.strict_json import read_json_object
from mnemos.text import tokenizer_files
from mnemos.text.huggingface import tokenizer_file
from mnemos.text.tokenizer import Tokenizer

JSON_NAME, MODEL_NAME = "tokenizer.json", "tokenizer.model"
OWN = "own_tokenizer"  # metadata.json's field with the class of a tokenizer that only its own class can read


def write_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Writes a tokenizer; returns what metadata.json says about it.

    tokenizer: a `mnemos.Tokenizer`, the path of a tokenizer's file or folder, one of transformers, tokenizers or
    sentencepiece; or an object of a class of the user's own. If that is no more than a table of characters or words, or
    bytes, which is tried, it is written as a tokenizer.json for everybody; else its own `save(path)` or `to_dict()`
    writes tokenizer.json, for `load_package(..., tokenizer_class=...)`. ConfigError: it has none of these.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = Tokenizer.from_file(os.fspath(tokenizer))
    tokenizer = getattr(tokenizer, "inner", tokenizer)  # of the engine's adapter
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, Tokenizer):
        _write_own_kind(tokenizer.source, folder)
    elif type(tokenizer).__module__.startswith("transformers.") and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif type(tokenizer).__module__.startswith("tokenizers") and hasattr(tokenizer, "to_str"):
        _write(folder / JSON_NAME, tokenizer.to_str(pretty=True))
    elif hasattr(tokenizer, "serialized_model_proto"):
        (folder / MODEL_NAME).write_bytes(tokenizer.serialized_model_proto())
    elif (text := equivalent_file(tokenizer)) is not None:
        _write(folder / JSON_NAME, text)
    else:
        _save_own(tokenizer, folder)
        return {OWN: kind}
    return {"tokenizer_class": kind}


def read_tokenizer(package: Package, tokenizer_class: Any = None) -> Any:
    """A package's tokenizer, or None if it has none.

    tokenizer_class: of one that only its own class can read: its from_file, load, from_pretrained or from_dict is used.
    ConfigError: it is needed and not given, or has none of these.
    """
    folder = package.path
    if package.metadata.get(OWN) is not None:
        return _read_own(folder, str(package.metadata[OWN]), tokenizer_class)
    if tokenizer_class is not None:
        raise ConfigError(
            f"tokenizer_class is {tokenizer_class!r} and {folder} has a tokenizer that needs none; leave it out"
        )
    if JSON_NAME in package.files or MODEL_NAME in package.files:
        return Tokenizer.from_file(folder).prepare()
    if models := sorted(name for name in package.files if name.endswith(".gguf") and "/" not in name):
        return Tokenizer.from_gguf(folder / models[0]).prepare()
    if not any(name in package.files for name in TOKENIZER_FILES if name.startswith(("vocab", "spiece"))):
        return None
    from mnemos.models.foreign.pretrained import load_tokenizer

    return load_tokenizer(folder, trust_remote_code=False)


def _write_own_kind(source: Path, folder: Path) -> None:
    if source.suffix == ".gguf":
        tokenizer_files.write_tokenizer(open_checkpoint(source), folder)
        return
    file = tokenizer_file(source)
    copy_tokenizer(file.parent, folder)
    name = MODEL_NAME if file.suffix == ".model" else JSON_NAME
    (folder / name).write_bytes(file.read_bytes())  # whatever its name was


def _save_own(tokenizer: Any, folder: Path) -> None:
    """By the tokenizer's own means, into tokenizer.json alone."""
    target = folder / JSON_NAME
    save = next(
        (f for name in ("save", "save_vocabulary", "to_file") if callable(f := getattr(tokenizer, name, None))), None
    )
    if save is not None:
        before = set(folder.iterdir())
        save(str(target))
        made = set(folder.iterdir()) - before
        if made != {target} or not target.is_file():
            raise ConfigError(
                f"tokenizer is a {type(tokenizer).__name__}, whose {save.__name__}({str(target)!r}) wrote "
                f"{sorted(path.name for path in made)}; expected that one file"
            )
        try:
            read_json_object(target)
        except FormatError as error:
            raise ConfigError(
                f"tokenizer is a {type(tokenizer).__name__}, whose {save.__name__} wrote no JSON; a pickle would "
                f"run code when it is read; expected a JSON object ({error})"
            ) from error
        return
    to_dict = next((f for name in ("to_dict", "to_json") if callable(f := getattr(tokenizer, name, None))), None)
    if to_dict is not None:
        state = to_dict()
        state = json.loads(state) if isinstance(state, str) else state
        if isinstance(state, dict):
            _write(target, json.dumps(state, indent=2, sort_keys=True))
            return
    raise ConfigError(
        f"tokenizer is a {type(tokenizer).__name__}, and nothing says how to write it; expected mnemos.Tokenizer, one "
        "of transformers, tokenizers or sentencepiece, a path, None, or an object with save(path) or to_dict()"
    )


def _read_own(folder: Path, name: str, tokenizer_class: Any) -> Any:
    if tokenizer_class is None:
        raise ConfigError(
            f"{folder / JSON_NAME}: was written by a {name[:60]}, a class of your own; expected "
            f"tokenizer_class={name[:60]}"
        )
    path = folder / JSON_NAME
    ways = {"from_file": path, "load": path, "from_pretrained": folder, "from_dict": None, "from_json": None}
    for way, argument in ways.items():
        method = getattr(tokenizer_class, way, None)
        if not callable(method):
            continue
        given: Any = (
            read_json_object(path)
            if way == "from_dict"
            else path.read_text("utf-8")
            if argument is None
            else str(argument)
        )
        if isinstance(inspect.getattr_static(tokenizer_class, way), (classmethod, staticmethod)):
            return method(given)
        made = tokenizer_class()
        found = getattr(made, way)(given)
        return made if found is None else found
    raise ConfigError(f"tokenizer_class is {tokenizer_class!r}; expected a class with one of {', '.join(ways)}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
