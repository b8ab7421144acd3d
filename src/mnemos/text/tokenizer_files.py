"""A model's tokenizer as the files that Hugging Face's libraries read: tokenizer.json and those beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError
from mnemos.formats.checkpoint import GENERATION_CONFIG_NAME, Checkpoint
from mnemos.formats.whole_file import not_written
from mnemos.text.core import ByteLevelSpelling
from mnemos.text.encoder import AddedToken, Step
from mnemos.text.gguf import Description, describe, named_templates, names_tokenizer
from mnemos.text.huggingface import read_settings
from mnemos.text.sentencepiece import metadata_with_settings
from mnemos.text.vocabulary import used_size

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
# The files of a tokenizer in a Hugging Face folder; copied as they are.
_FILES = (
    TOKENIZER_NAME, "tokenizer.model", CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", TEMPLATE_NAME, "chat_template.json", GENERATION_CONFIG_NAME,
)  # fmt: skip
_SPACE = "\u2581"


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Writes a model's tokenizer to `folder`, which exists: the names of the files, in the order of their writing.

    From a GGUF file: tokenizer.json, tokenizer_config.json, the chat templates as they are, and generation_config.json
    with the ids that begin, end and pad a text. From a Hugging Face folder: its files as they are, and a tokenizer.json
    made of SentencePiece's tokenizer.model where it has only that. What transformers reads gives the same ids.
    FormatError if there is no tokenizer; UnsupportedError for one that is not supported; those of `not_written`.
    """
    try:
        if checkpoint.kind == "gguf":
            return _write_metadata(checkpoint, folder)
        return _copy(checkpoint.folder, folder)
    except OSError as error:
        raise not_written(folder, error, what="the tokenizer") from error


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether `write_tokenizer` finds one among the model's files."""
    if checkpoint.kind == "gguf":
        return names_tokenizer(checkpoint.metadata)
    return any((checkpoint.folder / name).is_file() for name in (TOKENIZER_NAME, "tokenizer.model"))


def tokenizer_json(metadata: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The content of a tokenizer.json for the tokenizer in GGUF metadata; `label` is the file, for errors.

    Tokens that only fill a model's last rows are left out.
    """
    return _json_of(describe(metadata, label), metadata)


def _write_metadata(checkpoint: Checkpoint, folder: Path) -> list[str]:
    metadata, label = checkpoint.metadata, str(checkpoint.path)
    found = describe(metadata, label)
    texts = found.vocabulary.texts
    roles = {"bos_token": found.bos_id, "eos_token": found.eos_id, "pad_token": found.pad_id}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: texts[token] for role, token in roles.items() if token is not None},
        "clean_up_tokenization_spaces": False,
    }
    if found.unknown_id is not None and not isinstance(found.spelling, ByteLevelSpelling):
        config["unk_token"] = texts[found.unknown_id]
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(length) is int:
        config["model_max_length"] = length
    generation: dict[str, Any] = {
        f"{role}_id": token for role, token in roles.items() if token is not None and role != "eos_token"
    }
    ends = sorted(found.eos_ids, key=lambda token: (token != found.eos_id, token))
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    templates = _templates(metadata, label)
    files = {name: text for name, text in templates.items() if "\r" not in text}
    if files != templates:  # a reader of text files would take another line end for "\n"
        files = {}
        listed = {"default" if name == TEMPLATE_NAME else Path(name).stem: text for name, text in templates.items()}
        config["chat_template"] = (
            listed["default"]
            if list(listed) == ["default"]
            else [{"name": name, "template": text} for name, text in listed.items()]
        )
    written = [
        _write_json(folder / TOKENIZER_NAME, _json_of(found, metadata)),
        _write_json(folder / CONFIG_NAME, config, indent=2),
        _write_json(folder / GENERATION_CONFIG_NAME, dict(sorted(generation.items())), indent=2),
    ]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return [*written, *files]


def _templates(metadata: Mapping[str, Any], label: str) -> dict[str, str]:
    """The chat templates by the names of their files."""
    default = metadata.get("tokenizer.chat_template")
    found = {TEMPLATE_NAME: default} if isinstance(default, str) else {}
    for name, text in named_templates(metadata).items():
        if name != Path(name).name or name.startswith("."):
            raise FormatError(f"{label}: a chat template is named {name[:80]!r}, which cannot be a file's name")
        found[f"{_TEMPLATES}/{name}.jinja"] = text
    return found


def _copy(source: Path, folder: Path) -> list[str]:
    files = [name for name in _FILES if (source / name).is_file()]
    files += [f"{_TEMPLATES}/{path.name}" for path in sorted((source / _TEMPLATES).glob("*.jinja"))]
    if TOKENIZER_NAME not in files and "tokenizer.model" not in files:
        raise FormatError(f"{source}: has no tokenizer; expected a tokenizer.json or SentencePiece's tokenizer.model")
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if TOKENIZER_NAME not in files:
        file = source / "tokenizer.model"
        metadata = metadata_with_settings(file, read_settings(source))
        files.append(_write_json(folder / TOKENIZER_NAME, tokenizer_json(metadata, str(file))))
    return files


def _write_json(file: Path, content: dict[str, Any], indent: int | None = None) -> str:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8", newline="\n")
    return file.name


def _json_of(found: Description, metadata: Mapping[str, Any]) -> dict[str, Any]:
    size = used_size(metadata, len(found.vocabulary.texts))
    model = found.model.as_json()
    if isinstance(model["vocab"], dict):
        model["vocab"] = {text: token for text, token in model["vocab"].items() if token < size}
    else:
        model["vocab"] = model["vocab"][:size]
    added = sorted(found.pipeline.added, key=lambda token: token.id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token) for token in added if token.id < size],
        "normalizer": found.pipeline.normalizer,
        "pre_tokenizer": found.pipeline.pre_tokenizer,
        "post_processor": _surrounding(found),
        "decoder": _decoder(found),
        "model": model,
    }


def _added(token: AddedToken) -> dict[str, Any]:
    fields = token._asdict()
    return {"id": fields.pop("id"), "content": fields.pop("text"), **fields}


def _surrounding(found: Description) -> Step | None:
    """The post-processor that puts the special tokens around a text, or around each of two."""
    before, after = found.prefix_ids, found.suffix_ids
    if not before and not after:
        return None
    texts = found.vocabulary.texts

    def around(sequence: str, kind: int) -> list[Step]:
        def special(tokens: tuple[int, ...]) -> list[Step]:
            return [{"SpecialToken": {"id": texts[token], "type_id": kind}} for token in tokens]

        return [*special(before), {"Sequence": {"id": sequence, "type_id": kind}}, *special(after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            texts[token]: {"id": texts[token], "ids": [token], "tokens": [texts[token]]} for token in (*before, *after)
        },
    }


def _decoder(found: Description) -> Step:
    if isinstance(found.spelling, ByteLevelSpelling):
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    steps: list[Step] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    if found.spelling.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if found.adds_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
