"""Tokenizers from `tokenizer.json` and the small files beside it, as Hugging Face writes them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError, UnsupportedError
from mnemos.text.core import (
    END_NAMES,
    ByteLevelSpelling,
    SentencePieceSpelling,
    Spelling,
    TokenizerCore,
    WordSpelling,
    read_ids,
)
from mnemos.text.tokenizer_json import Source, read_source
from mnemos.text.word_spellings import Reading, word_spelling

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
MAX_ADDED = 1 << 16
_DECODERS = "ByteLevel, Metaspace, WordPiece, BPEDecoder, or a Sequence of Replace, ByteFallback, Strip and Fuse"


@dataclass(frozen=True)
class Settings:
    """The files beside tokenizer.json, parsed: {} for one that is not there."""

    tokenizer: dict[str, Any] = field(default_factory=dict)
    special: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)

    def special_text(self, role: str) -> str | None:
        """The text of the token that plays a role, such as eos_token."""
        text = self.tokenizer.get(role, self.special.get(role))
        text = text.get("content") if isinstance(text, dict) else text
        return text if isinstance(text, str) else None

    def added_tokens(self) -> dict[str, tuple[int | None, bool]]:
        """Tokens that these files add: text -> (id, if one is stated, whether it is special).

        tokenizer_config.json's added_tokens_decoder counts before added_tokens.json, and special are those that it
        says are, and those that play a role.
        """
        roles = {self.special_text(role) for role in ROLES}
        for source in (self.tokenizer, self.special):
            further = source.get("additional_special_tokens")
            for token in further if isinstance(further, list) else ():
                roles.add(token.get("content") if isinstance(token, dict) else token)
        found: dict[str, tuple[int | None, bool]] = {}
        decoder = self.tokenizer.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            text = entry.get("content") if isinstance(entry, dict) else None
            if isinstance(text, str) and text and key.isdecimal():
                found[text] = (int(key), bool(entry.get("special")) or text in roles)
        for text, token in self.added.items():
            if text and type(token) is int and text not in found:
                found[text] = (token, text in roles)
        return found


def read_settings(folder: Path) -> Settings:
    """The files beside a tokenizer."""
    names = ("tokenizer_config", "special_tokens_map", "generation_config", "config", "added_tokens")
    return Settings(*(_read_object(folder / f"{name}.json") for name in names))


def read_chat_templates(folder: Path, settings: Settings) -> tuple[str | None, dict[str, str]]:
    """(the default chat template, further ones by name).

    Where the default one is in several places, the first of these counts: chat_template.jinja, tokenizer_config.json,
    chat_template.json. Named ones are listed in tokenizer_config.json, or are files in additional_chat_templates/,
    which count before the list.
    """
    file = folder / "chat_template.jinja"
    stated = settings.tokenizer.get("chat_template")
    if stated is None:
        stated = _read_object(folder / "chat_template.json").get("chat_template")
    named: dict[str, str] = {}
    if isinstance(stated, list):
        entries = [(entry.get("name"), entry.get("template")) for entry in stated if isinstance(entry, dict)]
        named = {name: text for name, text in entries if isinstance(name, str) and isinstance(text, str)}
        stated = named.get("default")
        if stated is None and not named:
            raise FormatError(f"{folder}: chat_template is a list without a name and a template; it must have both")
    if stated is not None and not isinstance(stated, str):
        problem = f"chat_template is {str(stated)[:80]}"
        raise FormatError(f"{folder}: {problem}; it must be a string or a list of named ones")
    named |= {path.stem: _read_text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return _read_text(file) if file.is_file() else stated, named


def build_core(file: Path, settings: Settings) -> TokenizerCore:
    """The tokenizer in `file`."""
    source = read_source(file, _read_text(file), _missing(file, settings))
    spelling, strips_space, strips_end = _spelling(file, source.decoder)
    bos, eos, pad, unknown = (_special_id(file, settings, source, name) for name in ROLES)
    add_bos = not source.surrounds and settings.tokenizer.get("add_bos_token") is True
    return TokenizerCore(
        label=str(file),
        texts=source.texts,
        spelling=spelling,
        literal_ids=frozenset(token.id for token in source.added if not _is_text(spelling, token.text)),
        silent_ids=source.silent_ids,
        special_ids=frozenset(token.id for token in source.added if token.special),
        strips_space=strips_space,
        strips_end=strips_end,
        encoder=source.encoder,
        find=source.find,
        prefix_ids=(bos,) if add_bos and bos is not None else None if source.surrounds else (),
        suffix_ids=(),
        bos_id=bos,
        eos_id=eos,
        pad_id=pad,
        unknown_id=unknown,
        eos_ids=_end_ids(file, settings, source, eos),
    )


def _missing(file: Path, settings: Settings) -> list[tuple[str, int | None, bool]]:
    """Tokens of the files beside this one, and those that play a role, which it may lack."""
    missing = dict(settings.added_tokens())
    for role in ROLES:
        text = settings.special_text(role)
        if text and role != "unk_token":
            missing.setdefault(text, (None, True))
    if len(missing) > MAX_ADDED:
        raise FormatError(f"{file.parent}: the files beside {file.name} add {len(missing)} tokens; at most {MAX_ADDED}")
    return [(text, stated, special) for text, (stated, special) in missing.items()]


def _spelling(file: Path, decoder: Any) -> Reading:
    """What the file's `decoder` means. UnsupportedError for one that is not supported."""
    if decoder is None:
        return Reading(WordSpelling(), True)
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else None
    if not isinstance(steps, list) or not all(isinstance(s, dict) and isinstance(s.get("type"), str) for s in steps):
        raise FormatError(f"{file}: decoder is {str(decoder)[:200]}; it must be an object with a type")
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return Reading(ByteLevelSpelling())
    if kinds == ["Metaspace"] and steps[0].get("replacement", "\u2581") == "\u2581":
        return Reading(SentencePieceSpelling(False), steps[0].get("prepend_scheme", "always") != "never")
    replaces_space = any(
        step["type"] == "Replace" and step.get("pattern") == {"String": "\u2581"} and step.get("content") == " "
        for step in steps
    )
    if replaces_space and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and kinds.count("Replace") == 1:
        strips = [step for step in steps if step["type"] == "Strip"]
        if all(step.get("content") == " " and step.get("start") == 1 and step.get("stop") == 0 for step in strips):
            return Reading(SentencePieceSpelling("ByteFallback" in kinds), bool(strips))
    found = word_spelling(steps)
    if found is not None:
        return found
    raise UnsupportedError(f"{file}: decoder is {str(decoder)[:200]}; supported are {_DECODERS}")


def _is_text(spelling: Spelling, text: str) -> bool:
    """Whether the file's decoder makes text of an added token, as it does of all others."""
    try:
        spelling.token_bytes(text).decode()
    except UnicodeDecodeError:
        return False
    return True


def _special_id(file: Path, settings: Settings, source: Source, name: str) -> int | None:
    """The id of the token that plays the role `name`, such as eos_token: by its text, or by its id in another file."""
    text = settings.special_text(name)
    found = None if text is None else source.find(text)
    if found is not None:
        return found
    for origin, stated in (("generation_config.json", settings.generation), ("config.json", settings.model)):
        ids = read_ids(str(file.parent / origin), f"{name}_id", stated.get(f"{name}_id"), len(source.texts))
        if ids:
            return ids[0]
    return None


def _end_ids(file: Path, settings: Settings, source: Source, eos_id: int | None) -> frozenset[int]:
    ends = {token.id for token in source.added if token.text in END_NAMES}
    if eos_id is not None:
        ends.add(eos_id)
    return frozenset(ends) | stated_ends(file.parent, settings, len(source.texts))


def stated_ends(folder: Path, settings: Settings, size: int) -> frozenset[int]:
    """Tokens that end a generation as generation_config.json says, or else config.json."""
    for name, source in (("generation_config.json", settings.generation), ("config.json", settings.model)):
        if source.get("eos_token_id") is not None:
            return frozenset(read_ids(str(folder / name), "eos_token_id", source["eos_token_id"], size))
    return frozenset()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: byte {error.start} is not UTF-8; the file must be UTF-8 text") from error


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, {} if the file is not there."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file}: holds a {type(value).__name__}; it must be a JSON object")
    return value


def tokenizer_file(path: Path) -> Path:
    """The file to read: `path` itself, or what a folder has."""
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if os.path.isdir(path) else [path]
    for file in candidates:
        if os.path.isfile(file):
            return file
    needed = "a tokenizer.json is needed, or SentencePiece's tokenizer.model"
    raise FormatError(f"{candidates[0]}: does not exist; {needed}")
