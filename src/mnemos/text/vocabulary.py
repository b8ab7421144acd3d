"""The vocabulary in GGUF metadata: tokens, their types and scores, and what the file says about special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError
from mnemos.formats.string_array import StringArray
from mnemos.native import core
from mnemos.text.core import END_NAMES, read_id
from mnemos.text.pieces import PieceIds, PieceTexts

if TYPE_CHECKING:
    from mnemos._native import Pieces

PREFIX = "tokenizer.ggml."
TokenTypes = npt.NDArray[np.int32]


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, after SentencePiece."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Fill-in-the-middle tokens are control tokens whatever the file says of them; some end a generation, too.
_FILL_NAMES = (
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>",
    "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>",
)  # fmt: skip
# (metadata key, names), the first name that the vocabulary has counts
_FILL_ENDS = (
    ("fim_pad_token_id", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep_token_id", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep_token_id", ("<|file_sep|>",)),
)
# Marks of OpenAI's harmony format, which are part of the text that a caller parses.
_SHOWN_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """texts: n unique strings. ids: their ids. types: int32 (n,). scores: float32 (n,), None if the file has none.

    pieces: the same texts in the native core; None without it.
    """

    label: str
    texts: Sequence[str]
    ids: Mapping[str, int]
    types: TokenTypes
    scores: npt.NDArray[np.float32] | None
    metadata: Mapping[str, Any]
    pieces: Pieces | None

    def special_id(self, name: str, default: int | None = None) -> int | None:
        """The token id under `tokenizer.ggml.<name>`."""
        value = self.metadata.get(PREFIX + name)
        if value is None:
            return default if default is not None and default < len(self.texts) else None
        return read_id(self.label, PREFIX + name, value, len(self.texts))

    def flag(self, name: str, default: bool) -> bool:
        """The boolean under `tokenizer.ggml.<name>`."""
        value = self.metadata.get(PREFIX + name, default)
        if type(value) is not bool:
            raise FormatError(f"{self.label}: {PREFIX}{name} is {str(value)[:80]!r}; it must be a boolean")
        return value

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of these types, ascending."""
        found: list[int] = self.are(*types).nonzero()[0].tolist()
        return found

    def are(self, *types: TokenType) -> npt.NDArray[np.bool_]:
        """For each token, whether it is of one of these types."""
        return np.isin(self.types, types)


def read_vocabulary(metadata: Mapping[str, Any], label: str) -> Vocabulary:
    """Reads and checks the vocabulary; `label` is the file, for errors."""
    pieces = _read_pieces(metadata, label)
    if pieces is None:
        texts, ids = _read_all(metadata, label)
    else:
        texts, ids = PieceTexts(pieces), PieceIds(pieces)
    types = _read_numbers(metadata, "token_type", label, len(texts), "iu")
    scores = _read_numbers(metadata, "scores", label, len(texts), "iuf")
    if types is None:
        types = np.full(len(texts), TokenType.NORMAL)
    known = (types >= min(TokenType)) & (types <= max(TokenType))
    return Vocabulary(
        label,
        texts,
        ids,
        np.where(known, types, TokenType.UNDEFINED).astype(np.int32),
        None if scores is None else scores.astype(np.float32),
        metadata,
        pieces,
    )


def used_size(metadata: Mapping[str, Any], size: int) -> int:
    """How many ids there are of `size` without the unused ones at the end: converters name rows that pad a model."""
    types = metadata.get(PREFIX + "token_type")
    if not isinstance(types, np.ndarray) or types.shape != (size,):
        return size  # checked when the vocabulary is read
    used = np.flatnonzero(types != TokenType.UNUSED)
    return int(used[-1]) + 1 if used.size else size


def _read_pieces(metadata: Mapping[str, Any], label: str) -> Pieces | None:
    """Every token's text, in the native core."""
    if core is None:
        return None
    tokens = metadata.get(PREFIX + "tokens")
    try:
        if isinstance(tokens, StringArray) and len(tokens):
            pieces = core.Pieces.of_strings(tokens.data, len(tokens))
            if not pieces.empty_numbers():
                return pieces
        texts = read_strings(metadata, "tokens", label)
        return core.Pieces([text or f"[EMPTY_{index}]" for index, text in enumerate(texts)])
    except FormatError as error:
        raise FormatError(f"{label}: {PREFIX}tokens {error}") from error


def _read_all(metadata: Mapping[str, Any], label: str) -> tuple[Sequence[str], Mapping[str, int]]:
    """(every token's text, and their ids), the texts unique."""
    texts = read_strings(metadata, "tokens", label)
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts) or "" in ids:
        texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
        ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        index = next(i for i, text in enumerate(texts) if ids[text] != i)
        places = f"at {index} and at {ids[texts[index]]}"
        raise FormatError(f"{label}: {PREFIX}tokens holds {texts[index][:80]!r} {places}; tokens must be unique")
    return texts, ids


def read_strings(metadata: Mapping[str, Any], name: str, label: str, least: int = 1) -> list[str]:
    """The array of at least `least` strings under `tokenizer.ggml.<name>`."""
    value = metadata.get(PREFIX + name)
    if value is None:
        raise FormatError(f"{label}: {PREFIX}{name} is missing; without it there is no tokenizer")
    decode = getattr(value, "strings", None)
    strings: Any = decode() if decode is not None else value
    if not isinstance(strings, list) or len(strings) < least or (strings and not isinstance(strings[0], str)):
        expected = "an array of at least one string" if least else "an array of strings"
        raise FormatError(f"{label}: {PREFIX}{name} is {str(value)[:80]}; it must be {expected}")
    return strings


def _read_numbers(metadata: Mapping[str, Any], name: str, label: str, size: int, kinds: str) -> npt.NDArray[Any] | None:
    """The array of `size` numbers under `tokenizer.ggml.<name>`; `kinds` are the NumPy kinds allowed."""
    value = metadata.get(PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise FormatError(f"{label}: {PREFIX}{name} is {str(value)[:80]}; it must be an array of numbers")
    if value.shape != (size,):
        raise FormatError(f"{label}: {PREFIX}{name} has {value.size} entries; the vocabulary has {size} tokens")
    return value


def mark_special_tokens(vocabulary: Vocabulary, eos_id: int | None) -> tuple[TokenTypes, frozenset[int]]:
    """(types, corrected where converters often get them wrong; ids that end a generation), as llama.cpp decides."""
    types, ids = vocabulary.types.copy(), vocabulary.ids
    ends = {ids[name] for name in END_NAMES if name in ids}
    if "</s>" in ids and types[ids["</s>"]] == TokenType.NORMAL:
        ends.discard(ids["</s>"])  # in a vocabulary that does not mark it, it is an HTML tag
    for key, names in _FILL_ENDS:
        found = vocabulary.special_id(key, next((ids[name] for name in names if name in ids), None))
        if found is not None:
            ends.add(found)
    types[[*ends, *(ids[name] for name in _FILL_NAMES if name in ids)]] = TokenType.CONTROL
    types[[ids[name] for name in _SHOWN_NAMES if name in ids]] = TokenType.USER_DEFINED
    stated = (eos_id, vocabulary.special_id("eot_token_id"), vocabulary.special_id("eom_token_id"))
    ends.update(token for token in stated if token is not None)

    # In these formats that token ends only part of the answer.
    named = {vocabulary.texts[token] for token in ends}
    if "<|end|>" in named and named & {"<|call|>", "<|calls|>"} and named & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if named >= {"<|tool_response>", "</s>"}:
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    return types, frozenset(ends)
