"""Tokenizers of other libraries (transformers, tokenizers) or of the user's own, behind the engine's interface."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import index
from typing import Any

from mnemos.errors import ConfigError, RequestError, UnsupportedError, shown
from mnemos.text.core import END_NAMES

_ANCHORS = ("\x02", "\n", ":")  # texts to continue, which hardly any token combines with what follows
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<PAD>")
_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for a character whose last bytes are still missing


def adapt_tokenizer(tokenizer: Any) -> Any:
    """`tokenizer` if it has the interface of `mnemos.Tokenizer`, else a wrapper around it.

    A foreign one has encode(text) -> ids, or is called and returns input_ids, and has decode(ids) -> text. The keywords
    add_special_tokens and skip_special_tokens are used if there are any. ConfigError for anything else.
    """
    if tokenizer is None or all(hasattr(tokenizer, name) for name in ("encode", "decoder", "vocabulary_size")):
        return tokenizer
    if not callable(getattr(tokenizer, "decode", None)) or not (hasattr(tokenizer, "encode") or callable(tokenizer)):
        place = f"; a device is given by name, device={tokenizer!r}" if isinstance(tokenizer, str) else ""
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a mnemos.Tokenizer, or an object with encode(text) "
            f"and decode(ids) as those of transformers have{place}"
        )
    return ForeignTokenizer(tokenizer)


class ForeignTokenizer:
    """A tokenizer with encode and decode, with the part of `mnemos.Tokenizer`'s interface that the engine needs."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._encode = inner.encode if hasattr(inner, "encode") else inner
        self._takes_add_special = _takes(self._encode, "add_special_tokens")
        self._takes_skip_special = _takes(inner.decode, "skip_special_tokens")
        self._tidies = hasattr(inner, "clean_up_tokenization_spaces")  # " ." to ".": not reversible piece by piece
        # After another token, a text keeps the leading space that decoding it alone may strip.
        self._anchor = self._find_anchor() if self._takes_skip_special else []

    def _find_anchor(self) -> list[int]:
        try:
            return self.encode("a", add_special=False)[-1:]
        except RequestError:  # it has no such letter
            return []

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, continues: bool = False
    ) -> list[int]:
        """Token ids of a text; `continues`: it continues other text, so no space is prepended.

        Names of special tokens mean whatever the tokenizer makes of them. RequestError: the tokenizer refuses the text.
        """
        if continues:
            for anchor in _ANCHORS:
                before, ids = self.encode(anchor, False), self.encode(anchor + text, False)
                if before and ids[: len(before)] == before and self.decode(before).strip(" ") == anchor:
                    return ids[len(before) :]
            add_special = False
        if not isinstance(text, str):
            raise RequestError(f"the text to encode is of type {type(text).__name__}; it must be a str")
        try:
            ids = self._encode(text, add_special_tokens=add_special) if self._takes_add_special else self._encode(text)
        except Exception as error:
            raise self._refusal("encode", text if len(text) <= 60 else f"{text[:60]}...", error) from error
        if hasattr(ids, "keys"):
            ids = ids["input_ids"]
        ids = getattr(ids, "input_ids", getattr(ids, "ids", ids))
        try:
            row = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            row = row[0] if len(row) == 1 and isinstance(row[0], (list, tuple)) else row  # a batch of one
            return [index(token) for token in row]
        except TypeError as error:
            raise RequestError(f"the tokenizer's encode returned {shown(ids)}; expected a list of token ids") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of token ids; `continues`: they continue other text, so a leading space is kept.

        Ids that only the model has, where its vocabulary is padded, have no text. RequestError: the tokenizer refuses
        ids of its own.
        """
        ids = [int(token) for token in ids]
        if not continues or not self._anchor:
            return self._decode(ids, skip_special)
        before = self._decode(self._anchor, skip_special)
        return self._decode([*self._anchor, *ids], skip_special)[len(before) :]

    def decoder(self, skip_special: bool = True, continues: bool = False) -> ForeignDecoder:
        """A decoder for a stream of ids; its pieces add up to the result of `decode`."""
        return ForeignDecoder(self, skip_special, self._anchor if continues else [])

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        options = {"skip_special_tokens": skip_special} if self._takes_skip_special else {}
        if self._tidies:
            options["clean_up_tokenization_spaces"] = False
        try:
            return str(self.inner.decode(ids, **options))
        except UnicodeDecodeError as error:  # bytes that end within a character
            return bytes(error.object).decode(error.encoding, errors="replace")
        except Exception as error:
            known = [token for token in ids if token < self.vocabulary_size]
            if len(known) < len(ids):
                return self._decode(known, skip_special)
            raise self._refusal("decode", ids, error) from error

    def _refusal(self, what: str, value: object, error: Exception) -> RequestError:
        kind = type(self.inner).__name__
        return RequestError(f"the tokenizer, a {kind}, cannot {what} {value!r}: {type(error).__name__}: {error}")

    def token_bytes(self, token_id: int) -> bytes:
        raise UnsupportedError(
            f"the bytes of single tokens are not known of a {type(self.inner).__name__}; constrained texts need "
            "mnemos.Tokenizer.from_file('tokenizer.json')"
        )

    @cached_property
    def vocabulary_size(self) -> int:
        """Ids run from 0 to one less than this; 1 where the tokenizer does not say."""
        sizes = [1]
        for name in ("vocab_size", "n_vocab", "vocabulary_size", "get_vocab_size", "get_piece_size"):
            size = getattr(self.inner, name, None)
            if size is not None:
                sizes.append(int(size() if callable(size) else size))
                break
        if hasattr(self.inner, "__len__"):
            sizes.append(len(self.inner))
        vocabulary = self.inner.get_vocab() if hasattr(self.inner, "get_vocab") else None
        if isinstance(vocabulary, Mapping):  # ids may have gaps
            sizes.append(max(vocabulary.values(), default=0) + 1)
        return max(sizes)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text."""
        return frozenset(getattr(self.inner, "all_special_ids", self._added.values()))

    @cached_property
    def _added(self) -> Mapping[str, int]:
        """The special tokens by their texts, of a tokenizer of the tokenizers library, which gives them no roles."""
        if not hasattr(self.inner, "get_added_tokens_decoder"):
            return {}
        added = self.inner.get_added_tokens_decoder()
        return {entry.content: token for token, entry in added.items() if entry.special}

    @property
    def bos_id(self) -> int | None:
        return self._special("bos_token_id", "bos_id")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if it names one."""
        return self._special("eos_token_id", "eos_id", "eot_token")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation: the one that it names, else those with the usual names."""
        if self.eos_id is not None:
            return frozenset((self.eos_id,))
        return frozenset(token for text, token in self._added.items() if text in END_NAMES)

    @property
    def pad_id(self) -> int | None:
        """The token that pads shorter rows, by its role, else by its name."""
        named = self._special("pad_token_id", "pad_id")
        return named if named is not None else next((self._added[n] for n in _PAD_NAMES if n in self._added), None)

    def _special(self, *names: str) -> int | None:
        """The id that the tokenizer has under the first of these names, as a value or a method."""
        for name in names:
            value = getattr(self.inner, name, None)
            value = value() if callable(value) else value
            if isinstance(value, int) and value >= 0:
                return value
        return None


class ForeignDecoder:
    """Turns token ids into text one by one, by decoding the latest ones together; whole characters only."""

    def __init__(self, tokenizer: ForeignTokenizer, skip_special: bool, anchor: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = list(anchor)
        self._shown = len(anchor)  # of `_ids`, how many have been given out as text

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(int(token_id))
        piece = self._rest()
        if piece.endswith(_HALF):
            return ""
        if piece:
            del self._ids[: self._shown]
            self._shown = len(self._ids)
        return piece

    def finish(self) -> str:
        """What was still waiting."""
        return self._rest()

    def _rest(self) -> str:
        before = self._tokenizer._decode(self._ids[: self._shown], self._skip_special)
        return self._tokenizer._decode(self._ids, self._skip_special)[len(before) :]


def _takes(function: Any, keyword: str) -> bool:
    """Whether a callable has a parameter of that name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a compiled library's, without a signature
        return False
    return any(p.name == keyword or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
