"""SentencePiece's own file, `tokenizer.model`, for checkpoints that come without a `tokenizer.json`.

A protocol buffer, described in sentencepiece's sentencepiece_model.proto. Read are the kinds that SentencePiece calls
BPE (Llama, Mistral, Gemma) and unigram (T5, Albert and their relatives), with the normalization that the file holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.text.core import TokenizerCore
from mnemos.text.gguf import build_core as build_from_metadata
from mnemos.text.huggingface import MAX_ADDED, Settings, stated_ends
from mnemos.text.vocabulary import PREFIX, TokenType

MAX_BYTES = 64 << 20  # the largest in use have 5 MB
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_ROLE_KEYS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}  # fmt: skip
_DEFAULT_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}  # field of TrainerSpec, id


def build_core(file: Path, settings: Settings) -> TokenizerCore:
    """The tokenizer in `file`, with the tokens that the files beside it add."""
    core = build_from_metadata(metadata_with_settings(file, settings), str(file))
    return replace(core, eos_ids=core.eos_ids | stated_ends(file.parent, settings, len(core.texts)))


def metadata_with_settings(file: Path, settings: Settings) -> dict[str, Any]:
    """What a GGUF file would say of the tokenizer, with what the files beside it add and say of its special tokens."""
    metadata = read_metadata(file)
    _add_tokens(file, metadata, settings)
    _set_roles(metadata, settings)
    merges = metadata[PREFIX + "model"] == "llama"
    for flag, default in (("add_bos_token", merges), ("add_eos_token", False)):
        value = settings.tokenizer.get(flag)
        metadata[PREFIX + flag] = default if value is None else value
    return metadata


def read_metadata(file: Path) -> dict[str, Any]:
    """What a GGUF file of the same tokenizer would say of it."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise FormatError(f"{file}: has {size} bytes; a SentencePiece model may have {MAX_BYTES}")
        content = file.read_bytes()
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror}") from error
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: Mapping[int, Any] = {}
    normalizer: Mapping[int, Any] = {}
    for field, value in _fields(content, str(file)):
        if field == _PIECES:
            piece = dict(_fields(_message(value, f"{file}: piece {len(tokens)}"), f"{file}: piece {len(tokens)}"))
            tokens.append(_text(piece.get(1, b""), f"{file}: piece {len(tokens)}"))
            scores.append(_score(piece.get(2, b"\0\0\0\0"), f"{file}: score of piece {len(scores)}"))
            types.append(_kind(piece.get(3, int(TokenType.NORMAL)), f"{file}: type of piece {len(types)}"))
        elif field == _TRAINER:
            trainer = dict(_fields(_message(value, f"{file}: trainer_spec"), f"{file}: trainer_spec"))
        elif field == _NORMALIZER:
            normalizer = dict(_fields(_message(value, f"{file}: normalizer_spec"), f"{file}: normalizer_spec"))
    if not tokens:
        raise FormatError(f"{file}: has no pieces; a SentencePiece model is needed")
    _check_kind(file, trainer, normalizer)
    metadata: dict[str, Any] = {
        PREFIX + "model": "t5" if trainer.get(3, _UNIGRAM) == _UNIGRAM else "llama",
        PREFIX + "tokens": tokens,
        PREFIX + "scores": np.asarray(scores, np.float32),
        PREFIX + "token_type": np.asarray(types, np.int32),
        PREFIX + "add_space_prefix": bool(normalizer.get(3, 1)),
        PREFIX + "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        PREFIX + "precompiled_charsmap": normalizer.get(2, b""),
    }
    for name, (number, default) in _DEFAULT_IDS.items():
        token = trainer.get(number, default)
        # -1, as 64 bits, means that there is none, which differs from not saying.
        metadata[f"{PREFIX}{name}_token_id"] = token if isinstance(token, int) and 0 <= token < 2**31 else -1
    return metadata


def _check_kind(file: Path, trainer: Mapping[int, Any], normalizer: Mapping[int, Any]) -> None:
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise UnsupportedError(
            f"{file}: trainer_spec.model_type is {_KINDS.get(kind, kind)}; supported are bpe and unigram: "
            "convert it to a tokenizer.json (transformers' AutoTokenizer(...).save_pretrained does)"
        )
    if not isinstance(normalizer.get(2, b""), bytes):
        raise _not_a_model(f"{file}: normalizer_spec.precompiled_charsmap", f"is {normalizer[2]}")
    if trainer.get(24):
        raise UnsupportedError(f"{file}: trainer_spec.treat_whitespace_as_suffix is true; only false is supported")


def _add_tokens(file: Path, metadata: dict[str, Any], settings: Settings) -> None:
    """Tokens that the files beside it add after the vocabulary, or redefine."""
    origin = file.parent / "tokenizer_config.json"
    added = settings.tokenizer.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or len(added) > MAX_ADDED:
        raise FormatError(f"{origin}: added_tokens_decoder is {str(added)[:80]}; it must map ids to tokens")
    tokens, scores, types = (metadata[PREFIX + name] for name in ("tokens", "scores", "token_type"))
    scores, types = scores.tolist(), types.tolist()
    known = {text: index for index, text in enumerate(tokens)}
    listed = [entry.get("content") for entry in added.values() if isinstance(entry, dict)]
    for written, (token, special) in settings.added_tokens().items():
        if written not in listed:  # of added_tokens.json
            added = {**added, str(token): {"content": written, "special": special}}
    for key, entry in sorted(added.items(), key=lambda item: (len(item[0]), item[0])):
        text = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(text, str) or not text or int(key) > len(tokens):
            problem = f"added_tokens_decoder has {str(text)[:80]!r} at {key[:20]!r}, after {len(tokens)} tokens"
            raise FormatError(f"{origin}: {problem}; ids must follow each other")
        index = int(key)
        if known.setdefault(text, index) != index:
            raise FormatError(
                f"{origin}: added_tokens_decoder has {text[:80]!r} at {key}, which is token {known[text]}"
            )
        kind = int(TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED)
        if index == len(tokens):
            tokens.append(text)
            scores.append(0.0)
            types.append(kind)
        else:
            tokens[index] = text
            types[index] = types[index] if types[index] == TokenType.UNKNOWN else kind
    metadata[PREFIX + "scores"] = np.asarray(scores, np.float32)
    metadata[PREFIX + "token_type"] = np.asarray(types, np.int32)


def _set_roles(metadata: dict[str, Any], settings: Settings) -> None:
    """The files beside the model name the tokens that play a role by their texts; they win over the model's own ids."""
    tokens = metadata[PREFIX + "tokens"]
    for role, key in _ROLE_KEYS.items():
        text = settings.special_text(role)
        if text in tokens:
            metadata[PREFIX + key] = tokens.index(text)


def _fields(message: bytes, label: str) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: integers for varints, bytes for all else."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position, label)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position, label)
            yield field, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position, label)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise _not_a_model(label, f"has wire type {wire} at byte {position}")
        if size > len(message) - position:
            raise _not_a_model(
                label, f"needs {size} bytes at byte {position}, where {len(message) - position} are left"
            )
        yield field, message[position : position + size]
        position += size


def _varint(message: bytes, position: int, label: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _not_a_model(label, "ends in the middle of a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _not_a_model(label, f"has a number of more than 10 bytes at byte {position - 10}")


def _not_a_model(label: str, problem: str) -> FormatError:
    return FormatError(
        f"{label}: {problem}: not a SentencePiece model, or cut off; other tokenizers need a tokenizer.json"
    )


def _message(value: Any, label: str) -> bytes:
    if not isinstance(value, bytes):
        raise _not_a_model(label, f"is the number {value}")
    return value


def _text(value: Any, label: str) -> str:
    try:
        return _message(value, label).decode()
    except UnicodeDecodeError as error:
        raise _not_a_model(label, f"is {value[:40]!r}, which is not UTF-8") from error


def _score(value: Any, label: str) -> float:
    if not isinstance(value, bytes) or len(value) != 4:
        raise _not_a_model(label, f"is {str(value)[:40]}")
    return float(struct.unpack("<f", value)[0])


def _kind(value: Any, label: str) -> int:
    if value not in tuple(TokenType):
        raise _not_a_model(label, f"is {str(value)[:40]}")
    return int(value)
