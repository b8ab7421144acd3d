"""A folder's tokenizer as a GGUF file's metadata."""

from __future__ import annotations

import json
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.text.core import TokenizerCore, parse_byte_token
from mnemos.text.gguf import build_core
from mnemos.text.huggingface import Settings, read_chat_templates, read_settings
from mnemos.text.huggingface import build_core as build_from_json
from mnemos.text.pretokenizers import PRE_TOKENIZERS
from mnemos.text.sentencepiece import metadata_with_settings
from mnemos.text.vocabulary import PREFIX, TokenType

# A text that pre-tokenizers cut differently: cases, contractions, numbers, marks, spaces, line ends, scripts.
_PROBE = (
    "I'm sure it's 3.14159 or 1234567 or 12 34 567, DON'T you'LL we'Ve?! (see [x_1] + {y}) a/b\\c #tag @me 50% $9.99"
    "\n\n  two  spaces\t\ttabs \r\n\r\n   end   \n camelCaseHTTPServer snake_case_2 \u00c9t\u00e9 na\u00efve \u4f60"
    "\u597d\uff0c\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 "
    "\U0001f600\U0001f680 ... --- === \u2014\u201cquote\u201d\u2026 \u0661\u0662\u0663 x\u00b2+y\u00b3 'tis !!\n\t\n"
)
# Tried first: those of most models. One that cuts more, as qwen2 cuts numbers into digits, is before its like: with a
# vocabulary that has no numbers of several digits, both give the same ids.
_LIKELY = ("qwen2", "llama-bpe", "smollm", "gpt-2", "olmo", "gpt-4o", "tekken", "default")


NAME = "general.name"  # by which readers know Phi-3, whose tokens swallow the white space after them
_MOST_PROBED = 512  # added tokens that are tried in a text
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def tokenizer_metadata(folder: Path, vocabulary_size: int) -> dict[str, Any]:
    """`tokenizer.*` of a GGUF file with the tokenizer in this folder; `vocabulary_size` tokens, the model's rows.

    From tokenizer.json if its tokens spell bytes, else from SentencePiece's tokenizer.model, else from a tokenizer.json
    that was made of one. A folder without the files of a tokenizer gives a model that takes token ids only, with a
    warning. UnsupportedError for another kind, one that cuts text into words as none of the pre-tokenizers that GGUF
    names, or added tokens that take the white space beside them (GGUF says that of Phi-3's only, by the model's name).
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
        if source is not None and _falls_back_to_bytes(source):
            metadata |= _white_space(file, metadata, build_from_json(file, settings), strict=False)
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
    return metadata | {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}


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
    core = build_from_json(file, settings)
    ordinary = set(source["model"]["vocab"].values())
    metadata: dict[str, Any] = {
        PREFIX + "model": "gpt2",
        PREFIX + "tokens": list(core.texts),
        PREFIX + "token_type": np.asarray([_kind(i, core, ordinary) for i in range(len(core.texts))], np.int32),
        PREFIX + "merges": [m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]],
    }
    _pad(file, metadata, vocabulary_size)
    metadata |= _roles(core)
    metadata[PREFIX + "pre"] = _pre_tokenizer(file, metadata, core, source.get("pre_tokenizer"))
    return metadata | _white_space(file, metadata, core)


def _roles(core: TokenizerCore) -> dict[str, Any]:
    ids = {"bos": core.bos_id, "eos": core.eos_id, "padding": core.pad_id, "unknown": core.unknown_id}
    ids["eot"] = min(core.eos_ids - {core.eos_id}, default=None)
    found: dict[str, Any] = {f"{PREFIX}{role}_token_id": token for role, token in ids.items() if token is not None}
    encoded = core.encode("a", True, False)
    found[PREFIX + "add_bos_token"] = core.bos_id is not None and encoded[:1] == [core.bos_id]
    if core.eos_id is not None and encoded[-1:] == [core.eos_id]:
        found[PREFIX + "add_eos_token"] = True
    return found


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
    for text in (_PROBE, "", "  a", "a\n\n\n b"):
        if made.encode(text, True, False) != core.encode(text, True, False):
            raise UnsupportedError(
                f"{file}: encodes {text[:20]!r} otherwise than a SentencePiece tokenizer with its tokens; it cannot be "
                "converted to GGUF without its tokenizer.model"
            )
    return metadata | _white_space(file, metadata, core)


def _white_space(file: Path, metadata: Mapping[str, Any], core: TokenizerCore, strict: bool = True) -> dict[str, Any]:
    """What GGUF needs so that added tokens take white space beside them as in `file`: nothing, or Phi-3's name.

    strict: UnsupportedError where neither does it; else nothing.
    """
    texts = [core.texts[token] for token in sorted(core.literal_ids | core.special_ids)][:_MOST_PROBED]
    probes = [f"a {text} b" for text in texts if text]
    for more in ({}, {NAME: "Phi-3"}):
        made = build_core({**metadata, **more}, str(file))
        wrong = [probe for probe in probes if made.encode(probe, False, True) != core.encode(probe, False, True)]
        if not wrong:
            return more
    if not strict:
        return {}
    raise UnsupportedError(
        f"{file}: the added token {wrong[0][2:-2]!r} takes or leaves the white space beside it as no token of a GGUF "
        "file does; it cannot be converted"
    )


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


def _pre_tokenizer(file: Path, metadata: Mapping[str, Any], core: TokenizerCore, own: Any) -> str:
    """The name of the pre-tokenizer that cuts as this tokenizer does; own: the file's, for the error."""
    expected = core.encode(_PROBE, False, False)
    tried = set()
    for name in (*_LIKELY, *PRE_TOKENIZERS):
        style = PRE_TOKENIZERS[name]
        if style not in tried and style.byte_level:
            tried.add(style)
            if build_core({**metadata, PREFIX + "pre": name}, str(file)).encode(_PROBE, False, False) == expected:
                return name
    problem = f"cuts text into words as none of the {len(tried)} pre-tokenizers that GGUF names"
    raise UnsupportedError(f"{file}: {problem}; it cannot be converted (pre_tokenizer is {json.dumps(own)[:300]})")


def _sentencepiece_metadata(file: Path, settings: Settings, vocabulary_size: int) -> dict[str, Any]:
    metadata = metadata_with_settings(file, settings)
    _pad(file, metadata, vocabulary_size)
    metadata[PREFIX + "precompiled_charsmap"] = np.frombuffer(metadata[PREFIX + "precompiled_charsmap"], np.uint8)
    absent = [key for key, value in metadata.items() if key.endswith("_token_id") and value == -1]
    return {key: value for key, value in metadata.items() if key not in absent} | {PREFIX + "pre": "default"}
