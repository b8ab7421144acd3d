"""From texts to padded batches of token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mnemos.engine.prompts import listed, pad
from mnemos.errors import ConfigError, RequestError
from mnemos.rules import COUNT
from mnemos.text.foreign import adapt_tokenizer

Ids = npt.NDArray[np.int64]


class PaddedBatch(NamedTuple):
    """input_ids and attention_mask, both (batch, longest) int64; the mask's zeros mark padding."""

    input_ids: Ids
    attention_mask: Ids


class TokenProcessor:
    """Tokenization for batches: special tokens, truncation, padding with a mask, and decoding back to texts.

    max_length        longer texts lose their beginning, since generation continues their end; None: no limit
    pad_token_id      pads shorter rows; by default the tokenizer's pad token, else its end-of-text token, else 0
    padding_side      "right" or "left"; the engine accepts either together with the mask
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        pad_token_id: int | None = None,
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side is {padding_side!r}; expected 'right' or 'left'")
        if max_length is not None:
            COUNT.apply("max_length", max_length)
        self.tokenizer = adapt_tokenizer(tokenizer)
        self.max_length = max_length
        self.padding_side = padding_side
        known = (pad_token_id, getattr(self.tokenizer, "pad_id", None), getattr(self.tokenizer, "eos_id", None), 0)
        self.pad_token_id = next(token for token in known if token is not None)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text."""
        return frozenset(self.tokenizer.special_ids)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The last `max_length` token ids of one text."""
        ids: list[int] = self.tokenizer.encode(text, add_special=add_special)
        return ids if self.max_length is None else ids[-self.max_length :]

    def encode_batch(self, texts: Sequence[str], add_special: bool = True) -> PaddedBatch:
        """Token ids of several texts, padded to the longest. RequestError if there are none."""
        return self.pad([self.encode(text, add_special) for text in listed(texts)])

    def pad(self, sequences: Sequence[Sequence[int]]) -> PaddedBatch:
        """Rows of token ids, padded to the longest row."""
        if not sequences:
            raise RequestError("there is nothing to pad; give at least one sequence")
        left = self.padding_side == "left"
        mask = pad([[1] * len(sequence) for sequence in sequences], 0, left)
        return PaddedBatch(pad(sequences, self.pad_token_id, left), mask)

    def decode(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids."""
        text: str = self.tokenizer.decode([int(token) for token in token_ids], skip_special=skip_special)
        return text

    def decode_batch(self, token_ids: Any, attention_mask: Any = None, skip_special: bool = True) -> list[str]:
        """The texts of the rows, without the positions where the mask is 0."""
        rows = [[int(token) for token in row] for row in token_ids]
        if attention_mask is not None:
            pairs = zip(rows, attention_mask, strict=True)
            rows = [[token for token, real in zip(row, mask, strict=True) if real] for row, mask in pairs]
        return [self.decode(row, skip_special) for row in rows]
