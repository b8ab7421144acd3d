"""A folder's tokenizer as a GGUF file's metadata."""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.string_array import StringArray
from mnemos.text.core import END_NAMES, TokenizerCore, byte_characters, parse_byte_token
from mnemos.text.gguf import build_core
from mnemos.text.gguf_probes import check_added, check_merges, check_surrounding, pre_tokenizer
from mnemos.text.huggingface import Settings, read_chat_templates, read_settings
from mnemos.text.huggingface import build_core as build_from_json
from mnemos.text.llama_cpp import other_tokens
from mnemos.text.sentencepiece import metadata_with_settings
from mnemos.text.vocabulary import PREFIX, TokenType

_DEFAULT_EOS = {"gpt2": 11, "llama": 2, "t5": 1}  # llama.cpp's, by the model
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def tokenizer_metadata(folder: Path, vocabulary_size: int) -> dict[str, Any]:
    """`tokenizer.*` of a GGUF file with the tokenizer in this folder; `vocabulary_size` tokens, the model's rows.

    From tokenizer.json if its tokens spell bytes, else from SentencePiece's tokenizer.model, else from a tokenizer.json
    that was made of one, which also counts where llama.cpp would not apply the tokenizer.model beside it. A folder
    without the files of a tokenizer gives a model that takes token ids only, with a warning. UnsupportedError for
    another kind, or one that does what GGUF cannot say: words cut as none of the pre-tokenizers that GGUF names does,
    text changed before, other tokens around a text than bos and eos, added tokens that take the white space beside them
    (GGUF says that of Phi-3's only, by the model's name).
    """
    if not any((folder / name).is_file() for name in _FILES):
        warnings.warn(f"{folder}: has no tokenizer; the GGUF file takes token ids only", stacklevel=2)
        return {PREFIX + "model": "none"}
    settings = read_settings(folder)
    file = folder / "tokenizer.json"
    source = _read(file)
    if source is not None and _is_byte_level(source):
        metadata = _byte_level_metadata(file, source, settings, vocabulary_size)
    elif (folder / "tokenizer.model").is_file():
        metadata = _sentencepiece_metadata(folder / "tokenizer.model", settings, vocabulary_size)
        if source is not None and _falls_back_to_bytes(source) and other_tokens(metadata) is not None:
            metadata = _byte_fallback_metadata(file, source, settings, vocabulary_size)  # what is read, and simpler
        elif source is not None and _falls_back_to_bytes(source):
            made = build_core(metadata, str(file))
            metadata |= check_added(file, metadata, made, build_from_json(file, settings), strict=False)
        else:
            _check_flags(folder, settings)
    elif source is not None and _falls_back_to_bytes(source):
        metadata = _byte_fallback_metadata(file, source, settings, vocabulary_size)
    else:
        raise UnsupportedError(
            f"{folder}: its tokenizer cannot be converted to GGUF; a tokenizer.json whose tokens spell bytes "
            "(byte-level BPE), or SentencePiece's tokenizer.model, can"
        )
    template, named = read_chat_templates(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    further = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
    if further:
        metadata["tokenizer.chat_templates"] = sorted(named.keys() - {"default"})
    return metadata | further


def _check_flags(folder: Path, settings: Settings) -> None:
    """UnsupportedError: tokenizer_config.json adds a token with a flag for which GGUF has no key."""
    for entry in settings.tokenizer.get("added_tokens_decoder", {}).values():
        flag = next((name for name in ("lstrip", "rstrip", "single_word") if entry.get(name)), None)
        if flag is not None:
            raise UnsupportedError(
                f"{folder / 'tokenizer_config.json'}: {flag} of the added token {entry.get('content')!r} is true, "
                "which GGUF cannot say; it cannot be converted"
            )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else None


def _is_byte_level(source: Mapping[str, Any]) -> bool:
    model = source.get("model") or {}
    merges = model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
    return merges and "ByteLevel" in str(source.get("decoder"))


def _byte_level_metadata(
    file: Path, source: Mapping[str, Any], settings: Settings, vocabulary_size: int
) -> dict[str, Any]:
    _check_normalizers(file, source)
    core = build_from_json(file, settings)
    vocabulary = source["model"]["vocab"]
    missing = [byte for byte, character in enumerate(byte_characters()) if character not in vocabulary]
    if missing:
        warnings.warn(
            f"{file}: has no tokens for {len(missing)} of the 256 bytes, such as {missing[0]}; llama.cpp may take "
            "other tokens around them",
            stacklevel=3,
        )
    ordinary = set(vocabulary.values())
    plain = [name for name in END_NAMES if vocabulary.get(name, -1) not in {-1, *core.literal_ids, *core.special_ids}]
    if plain:
        warnings.warn(
            f"{file}: has {', '.join(map(repr, plain))} as ordinary text, for which llama.cpp takes special tokens",
            stacklevel=3,
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]]
    metadata: dict[str, Any] = {
        PREFIX + "model": "gpt2",
        PREFIX + "tokens": list(core.texts),
        PREFIX + "token_type": np.asarray([_kind(i, core, ordinary) for i in range(len(core.texts))], np.int32),
        # a tokenizer of bytes alone has none; GGUF wants the type of an array that is empty
        PREFIX + "merges": merges or StringArray(str(file), np.empty(0, np.uint8), np.zeros(1, np.int64)),
    }
    _pad(file, metadata, vocabulary_size)
    metadata |= _roles(core)
    metadata[PREFIX + "pre"] = pre_tokenizer(file, metadata, core, source.get("pre_tokenizer"))
    made = build_core(metadata, str(file))
    check_surrounding(file, made, core)
    metadata |= check_added(file, metadata, made, core)
    return metadata | _stand_in_for_eos(file, metadata)


def _check_normalizers(file: Path, source: Mapping[str, Any]) -> None:
    """UnsupportedError: the tokenizer changes a text before it cuts it, which those of GGUF that spell bytes do not, or
    cuts it by chance."""
    if source["model"].get("dropout"):
        raise UnsupportedError(f"{file}: its model's dropout is {source['model']['dropout']}; expected none")
    kinds = [step.get("type") for step in _steps(source.get("normalizer"))]
    if other := next((kind for kind in kinds if kind != "NFC"), None):
        raise UnsupportedError(
            f"{file}: its normalizer is {other}; GGUF's tokenizers that spell bytes have none, so that texts would "
            "become other tokens; it cannot be converted"
        )
    if kinds:
        warnings.warn(
            f"{file}: composes characters (NFC), which readers of a GGUF file do not: 'e' with a combining accent "
            "becomes other tokens there",
            stacklevel=3,
        )


def _steps(normalizer: Any) -> Iterator[Mapping[str, Any]]:
    """The normalizers of a sequence, or the only one."""
    if isinstance(normalizer, Mapping):
        if normalizer.get("type") != "Sequence":
            yield normalizer
        for step in normalizer.get("normalizers") or ():
            yield from _steps(step)


def _roles(core: TokenizerCore) -> dict[str, Any]:
    encoded, plain = core.encode("a", True, False), core.encode("a", False, False)
    before = next((n for n in range(len(encoded)) if encoded[n : n + len(plain)] == plain), 0)
    prefix, suffix = encoded[:before], encoded[before + len(plain) :]
    bos = prefix[0] if core.bos_id is None and len(prefix) == 1 else core.bos_id
    eos = suffix[0] if core.eos_id is None and len(suffix) == 1 else core.eos_id
    ids = {"bos": bos, "eos": eos, "padding": core.pad_id, "unknown": core.unknown_id}
    ids["eot"] = min(core.eos_ids - {eos}, default=None)
    found: dict[str, Any] = {f"{PREFIX}{role}_token_id": token for role, token in ids.items() if token is not None}
    found[PREFIX + "add_bos_token"] = bos is not None and prefix == [bos]
    if suffix:
        found[PREFIX + "add_eos_token"] = True
    return found


def _stand_in_for_eos(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An end token for a tokenizer without one, for which llama.cpp would take an ordinary token by its number.

    One that no text has: padding, an unused row, or the unknown token; where there is none, a warning.
    """
    key = PREFIX + "eos_token_id"
    if key in metadata:
        return {}
    types = metadata[PREFIX + "token_type"]
    silent = (types == TokenType.UNUSED).nonzero()[0]
    stated = (metadata.get(f"{PREFIX}{role}_token_id") for role in ("padding", "unknown"))
    found = next((token for token in (*stated, *silent[-1:].tolist()) if token is not None), None)
    if found is not None:
        return {key: found}
    default = _DEFAULT_EOS[metadata[PREFIX + "model"]]
    if default < len(types) and types[default] == TokenType.NORMAL:
        text = metadata[PREFIX + "tokens"][default]
        warnings.warn(f"{file}: has no end token; llama.cpp ends a text at token {default}, {text!r}", stacklevel=4)
    return {}


def _falls_back_to_bytes(source: Mapping[str, Any]) -> bool:
    model = source.get("model") or {}
    return model.get("type", "BPE") == "BPE" and model.get("byte_fallback") is True


def _byte_fallback_metadata(
    file: Path, source: Mapping[str, Any], settings: Settings, vocabulary_size: int
) -> dict[str, Any]:
    """Merges in the order of a list, as SentencePiece's scores: a token is worth what its first merge comes before."""
    core = build_from_json(file, settings)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in source["model"]["merges"]]
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    texts, ordinary = list(core.texts), set(source["model"]["vocab"].values())
    types = [
        TokenType.UNKNOWN if i == core.unknown_id
        else TokenType.BYTE if i in ordinary and parse_byte_token(text) is not None
        else _kind(i, core, ordinary)
        for i, text in enumerate(texts)
    ]  # fmt: skip
    metadata: dict[str, Any] = {
        PREFIX + "model": "llama",
        PREFIX + "pre": "default",
        PREFIX + "tokens": texts,
        PREFIX + "scores": np.asarray([-rank.get(text, len(merges) + i) for i, text in enumerate(texts)], np.float32),
        PREFIX + "token_type": np.asarray(types, np.int32),
        PREFIX + "add_space_prefix": core.texts[core.encode("a", False, False)[0]].startswith("\u2581"),
        **_roles(core),
    }
    _pad(file, metadata, vocabulary_size)
    made = build_core(metadata, str(file))
    check_merges(file, made, core)
    check_surrounding(file, made, core)
    alike = all(made.encode(text, True, False) == core.encode(text, True, False) for text in ("", " a", "  a"))
    if not alike:
        warnings.warn(
            f"{file}: puts no space before a text that begins with one or follows a special token, which readers of a "
            "GGUF file do: ' a' becomes other tokens there",
            stacklevel=3,
        )
    else:
        metadata |= check_added(file, metadata, made, core)
    return metadata | _stand_in_for_eos(file, metadata)


def _kind(token: int, core: TokenizerCore, ordinary: Container[int]) -> TokenType:
    if token in core.special_ids:
        return TokenType.CONTROL
    if token in core.silent_ids:
        return TokenType.UNUSED
    return TokenType.NORMAL if token in ordinary and token not in core.literal_ids else TokenType.USER_DEFINED


def _pad(file: Path, metadata: dict[str, Any], vocabulary_size: int) -> None:
    """Tokens for the rows that a model has beyond its tokenizer."""
    tokens, types = metadata[PREFIX + "tokens"], metadata[PREFIX + "token_type"]
    missing = vocabulary_size - len(tokens)
    if missing < 0:
        raise FormatError(f"{file}: has {len(tokens)} tokens; the model has rows for {vocabulary_size}")
    metadata[PREFIX + "tokens"] = [
        text or f"[PAD{i}]" for i, text in enumerate([*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(missing))])
    ]
    metadata[PREFIX + "token_type"] = np.append(types, np.full(missing, TokenType.UNUSED, np.int32))
    if PREFIX + "scores" in metadata:
        metadata[PREFIX + "scores"] = np.append(metadata[PREFIX + "scores"], np.full(missing, -1000, np.float32))


def _sentencepiece_metadata(file: Path, settings: Settings, vocabulary_size: int) -> dict[str, Any]:
    metadata = metadata_with_settings(file, settings)
    _pad(file, metadata, vocabulary_size)
    absent = {key for key, value in metadata.items() if key.endswith("_token_id") and value == -1}
    if PREFIX + "bos_token_id" in absent:
        metadata[PREFIX + "add_bos_token"] = False  # readers would take token 1
    table = metadata.pop(PREFIX + "precompiled_charsmap")
    if table:
        metadata[PREFIX + "precompiled_charsmap"] = np.frombuffer(table, np.uint8)
    kept = {key: value for key, value in metadata.items() if key not in absent} | {PREFIX + "pre": "default"}
    return kept | _stand_in_for_eos(file, kept)
