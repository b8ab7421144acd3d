"""The models of GGUF's tokenizers, in the native core and as the `tokenizers` library has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mnemos.errors import FormatError
from mnemos.formats.string_array import StringArray
from mnemos.native import core
from mnemos.text.library import library_errors
from mnemos.text.vocabulary import PREFIX, TokenType, Vocabulary, read_strings

if TYPE_CHECKING:
    from mnemos._native import Pieces, TextModel

_HIDDEN = "\ufdd3"  # part of no text: pieces with it are never found
_LEAST_SCORE = -1e6  # of a piece that is worse than any other


class Model(Protocol):
    """Words to ids."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def compiled(self, pieces: Pieces) -> TextModel:
        """The native core's, over the vocabulary's pieces. FormatError for a damaged one."""

    def as_json(self) -> dict[str, Any]:
        """The field `model` of a tokenizer.json. FormatError for a damaged one."""

    def of_library(self) -> Any:
        """The `tokenizers` library's, to which special tokens are text that it never finds. Errors: as `as_json`."""


class MergedModel(NamedTuple):
    """Sennrich et al. 2016, arXiv:1508.07909: neighbours are merged in the order of the file's list.

    ignore_merges: a word that is a token as a whole is taken as it is. byte_fallback: what has no token becomes bytes.
    """

    vocabulary: Vocabulary
    ignore_merges: bool
    byte_fallback: bool

    def compiled(self, pieces: Pieces) -> TextModel:
        label = self.vocabulary.label
        options = (-1, False, self.byte_fallback, self.ignore_merges, "", "")
        merges = self.vocabulary.metadata.get(PREFIX + "merges")
        assert core is not None  # it made the pieces
        try:
            if isinstance(merges, StringArray):
                return core.bpe_of_strings(pieces, merges.data, len(merges), options)
            return core.bpe(pieces, read_strings(self.vocabulary.metadata, "merges", label, least=0), options)
        except FormatError as error:
            if str(error).startswith(label):
                raise
            problem = error if str(error).startswith("holds") else f"do not fit {PREFIX}tokens: {error}"
            raise FormatError(f"{label}: {PREFIX}merges {problem}") from error

    def as_json(self) -> dict[str, Any]:
        label = self.vocabulary.label
        merges = split_merges(read_strings(self.vocabulary.metadata, "merges", label, least=0), label)
        return _bpe_json(self.vocabulary, merges, byte_fallback=self.byte_fallback, ignore_merges=self.ignore_merges)

    def of_library(self) -> Any:
        return _library_model(self.as_json(), f"{self.vocabulary.label}: {PREFIX}merges do not fit {PREFIX}tokens")


class ScoredModel(NamedTuple):
    """SentencePiece's byte-pair encoding: two neighbours that form a token merge, those with the best score first."""

    vocabulary: Vocabulary
    unknown: int | None

    def compiled(self, pieces: Pieces) -> TextModel:
        order = np.full(len(self.vocabulary.texts), -1, np.int32)
        ordered = mergeable_by_score(self.vocabulary)
        order[ordered] = np.arange(len(ordered), dtype=np.int32)
        unknown = -1 if self.unknown is None else self.unknown
        assert core is not None
        return core.scored_bpe(pieces, order, (unknown, True, True, False, "", ""))

    def as_json(self) -> dict[str, Any]:
        unknown = None if self.unknown is None else self.vocabulary.texts[self.unknown]
        return _bpe_json(self.vocabulary, merges_by_score(self.vocabulary), unknown=unknown, byte_fallback=True)

    def of_library(self) -> Any:
        return _library_model(self.as_json(), f"{self.vocabulary.label}: the vocabulary cannot be used")


class UnigramModel(NamedTuple):
    """Kudo 2018, arXiv:1804.10959: of all ways to cut a text into pieces, the most probable one."""

    vocabulary: Vocabulary
    unknown: int | None
    byte_fallback: bool

    def compiled(self, pieces: Pieces) -> TextModel:
        assert self.vocabulary.scores is not None
        hidden = (~self._written()).nonzero()[0].tolist()
        scores = self.vocabulary.scores.astype(np.float64)
        unknown = -1 if self.unknown is None else self.unknown
        assert core is not None
        return core.unigram(pieces, scores, hidden, unknown, self.byte_fallback)

    def as_json(self) -> dict[str, Any]:
        assert self.vocabulary.scores is not None
        never = self.vocabulary.are(TokenType.UNUSED, TokenType.UNDEFINED)
        scores = np.where(never, _LEAST_SCORE, self.vocabulary.scores.astype(np.float64)).tolist()
        return self._json(self.vocabulary.texts, scores)

    def of_library(self) -> Any:
        assert self.vocabulary.scores is not None
        written = self._written()
        texts = [text if written[i] else text + _HIDDEN for i, text in enumerate(self.vocabulary.texts)]
        source = self._json(texts, self.vocabulary.scores.tolist())
        return _library_model(source, f"{self.vocabulary.label}: the vocabulary cannot be used")

    def _json(self, texts: Sequence[str], scores: list[float]) -> dict[str, Any]:
        pieces = [[text, score] for text, score in zip(texts, scores, strict=True)]
        return {"type": "Unigram", "unk_id": self.unknown, "vocab": pieces, "byte_fallback": self.byte_fallback}

    def _written(self) -> npt.NDArray[np.bool_]:
        """Which pieces plain text may become."""
        return self.vocabulary.are(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.BYTE)


def _bpe_json(
    vocabulary: Vocabulary,
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None = None,
    byte_fallback: bool,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {text: token for token, text in enumerate(vocabulary.texts)},
        "merges": [list(pair) for pair in merges],
    }


def _library_model(source: dict[str, Any], what: str) -> Any:
    """The library's model of a tokenizer.json's field `model`; `what` begins the error for a damaged one."""
    from json import dumps

    from tokenizers import Tokenizer

    with library_errors(what):
        return Tokenizer.from_str(dumps({"model": source})).model


def split_merges(merges: Sequence[str], label: str) -> list[tuple[str, str]]:
    """The two halves of each merge, which a space divides."""
    pairs = []
    for index, merge in enumerate(merges):
        divider = merge.find(" ", 1)  # the first half is never empty, but may be a space
        if divider < 0 or divider + 1 == len(merge):
            problem = f"holds {merge[:80]!r} at {index}; a merge is two tokens with a space between"
            raise FormatError(f"{label}: {PREFIX}merges {problem}")
        pairs.append((merge[:divider], merge[divider + 1 :]))
    return pairs


def mergeable_by_score(vocabulary: Vocabulary) -> npt.NDArray[np.intp]:
    """Tokens that take part in merges, that with the best score first: plain text never becomes a special token."""
    assert vocabulary.scores is not None
    candidates = vocabulary.are(TokenType.NORMAL, TokenType.USER_DEFINED).nonzero()[0]
    return candidates[np.argsort(-vocabulary.scores[candidates], kind="stable")]


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens whose concatenation is a token, in the order in which SentencePiece merges them."""
    texts, ids = vocabulary.texts, vocabulary.ids
    ordered = mergeable_by_score(vocabulary).tolist()
    mergeable = {texts[token] for token in ordered}
    merges = []
    for token in ordered:
        text = texts[token]
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in halves if pair[0] in mergeable and pair[1] in mergeable]
        # The pair whose left half is the better token usually stands first in a text, too.
        merges.extend(pairs if len(pairs) < 2 else sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])))
    return merges
