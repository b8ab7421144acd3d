"""Tokenizers of the user's own that are no more than a table: the tokenizer.json that does the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mnemos.text.tokenizer import Tokenizer

_MOST_TOKENS = 1 << 20
_STRANGE = "\U000f0000"  # a character for private use, which no table has
_PIECES: dict[str, dict[str, Any]] = {
    "characters": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "words": {"type": "WhitespaceSplit"},
}


def equivalent_file(tokenizer: Any) -> str | None:
    """The content of a tokenizer.json that encodes and decodes as `tokenizer` does; None if it is no mere table.

    What it does is tried on texts of its own tokens before that is believed.
    """
    encode, decode = getattr(tokenizer, "encode", None), getattr(tokenizer, "decode", None)
    if not callable(encode) or not callable(decode):
        return None
    for vocabulary in [*_tables(tokenizer), *_bytes_table()]:
        for content, probes in _candidates(vocabulary, _unknown(vocabulary, encode)):
            if _same(content, encode, decode, probes):
                return content
    return None


def _tables(tokenizer: Any) -> list[dict[str, int]]:
    """The tables from texts to ids that an object has: its attributes, or what get_vocab() returns."""
    found = [value for value in getattr(tokenizer, "__dict__", {}).values() if isinstance(value, Mapping)]
    if callable(getattr(tokenizer, "get_vocab", None)):
        found.insert(0, tokenizer.get_vocab())
    return [
        {str(text): int(token) for text, token in table.items()}
        for table in found
        if 0 < len(table) <= _MOST_TOKENS
        and all(isinstance(text, str) and text and type(token) is int and token >= 0 for text, token in table.items())
    ]


def _bytes_table() -> list[dict[str, int]]:
    """Bytes as tokens, in the alphabet of byte-level tokenizers, with the bytes' values as ids."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [{letters[byte]: byte for byte in range(256)}]


def _unknown(vocabulary: dict[str, int], encode: Callable[[str], Any]) -> str | None:
    """The token for what the table has not; None if that is refused."""
    ids = _ids(encode, _STRANGE)
    return next((text for text, token in vocabulary.items() if ids == [token]), None)


def _ids(encode: Callable[[str], Any], text: str) -> list[int] | None:
    """The ids of a text; None if it is refused."""
    try:
        return [int(token) for token in encode(text)]
    except Exception:  # whatever a class of the user's own raises
        return None


def _candidates(vocabulary: dict[str, int], unknown: str | None) -> list[tuple[str, list[str]]]:
    """(tokenizer.json, texts to try it on) for each way in which a table may be used."""
    texts = sorted(vocabulary)
    if len(vocabulary) == 256 and vocabulary == _bytes_table()[0]:
        pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        content = _content({"type": "BPE", "vocab": vocabulary, "merges": []}, pieces, pieces)
        return [(content, ["Hello, world", " a  b\n\tc ", "\u00e9\u4f60\U0001f600"])]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown or _STRANGE}
    letters = [text for text in texts if len(text) == 1 and text != unknown]
    words = [text for text in texts if not any(character.isspace() for character in text)]
    made = []
    if len(words) == len(texts):
        samples = [" ".join(words[start::5][:50]) for start in range(min(5, len(words)))]
        made.append((_content(model, _PIECES["words"], None), samples))
    if letters:
        samples = ["".join(letters[start::7]) for start in range(min(7, len(letters)))]
        longer = [text for text in texts if len(text) > 1]  # which a table of words would know
        samples += ["".join(letters[:50][::-1]), *longer[:5], *longer[-5:]]
        made.append((_content(model, _PIECES["characters"], {"type": "Fuse"}), samples))
    return made


def _content(model: dict[str, Any], pieces: dict[str, Any], decoder: dict[str, Any] | None) -> str:
    parts = {"normalizer": None, "pre_tokenizer": pieces, "post_processor": None, "decoder": decoder, "model": model}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts}, ensure_ascii=False, indent=1)


def _same(content: str, encode: Callable[[str], Any], decode: Callable[[Any], Any], probes: list[str]) -> bool:
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(content, encoding="utf-8")
            made = Tokenizer.from_file(path).prepare()
        ids = {text: _ids(encode, text) for text in [*probes, _STRANGE]}
        if not ids[probes[0]] or any(_ids(made.encode, text) != found for text, found in ids.items()):
            return False
        return all(made.decode(found) == decode(found) for text, found in ids.items() if found and text != _STRANGE)
    except Exception:  # whatever an object that is something else raises
        return False
