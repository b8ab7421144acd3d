"""Texts as padded batches of token ids, in the form that programs for other libraries' tokenizers expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnemos.errors import ConfigError, RequestError
from mnemos.rules import COUNT


class Encoding(dict[str, Any]):
    """input_ids and attention_mask, also as attributes: lists, or arrays or tensors (batch, time) int64.

    A mapping, so that `engine.generate(**encoding)` works.
    """

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]

    def to(self, device: Any) -> Encoding:
        """The same with its tensors on a device of PyTorch's."""
        return Encoding({name: value.to(device) if hasattr(value, "to") else value for name, value in self.items()})


@dataclass(frozen=True)
class Form:
    """The form in which texts are encoded; see `Tokenizer.__call__`. ConfigError for a value that is not allowed."""

    padding: bool | str = False
    truncation: bool | None = None
    max_length: int | None = None
    padding_side: str = "left"
    return_tensors: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
        if self.max_length is not None:
            COUNT.apply("max_length", self.max_length)
        elif self.padding == "max_length":
            raise ConfigError("padding is 'max_length' and max_length is None; give a length")

    def cut(self, ids: list[int]) -> list[int]:
        """The ids without their beginning, where there are too many."""
        return ids if self.max_length is None or self.truncation is False else ids[-self.max_length :]


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "padding": (False, True, "longest", "max_length"),
    "truncation": (None, False, True),
    "padding_side": ("left", "right"),
    "return_tensors": (None, "np", "pt"),
}


def encode_texts(encode: Callable[[str], list[int]], texts: str | Sequence[str], pad_id: int, form: Form) -> Encoding:
    """Encodes one text or several; see `Tokenizer.__call__`."""
    padding, return_tensors = form.padding, form.return_tensors
    single = isinstance(texts, str)
    wanted = [texts] if isinstance(texts, str) else list(texts)
    if not wanted:
        raise RequestError("there is no text to encode; give at least one")
    rows = [form.cut(encode(text)) for text in wanted]
    longest = max(map(len, rows))
    if form.padding == "max_length" and form.max_length is not None:
        longest = max(longest, form.max_length)
    if not padding and return_tensors is not None and any(len(row) < longest for row in rows):
        raise ConfigError(
            f"return_tensors is {return_tensors!r} and the texts have {min(map(len, rows))} to {longest} tokens; "
            "rows of one length need padding=True"
        )
    gaps = [longest - len(row) if padding else 0 for row in rows]
    left = form.padding_side == "left"
    masks = [_pad([1] * len(row), 0, gap, left) for gap, row in zip(gaps, rows, strict=True)]
    rows = [_pad(row, pad_id, gap, left) for gap, row in zip(gaps, rows, strict=True)]
    if return_tensors is None:
        return Encoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)
    arrays = {"input_ids": np.array(rows, np.int64), "attention_mask": np.array(masks, np.int64)}
    if return_tensors == "np":
        return Encoding(arrays)
    import torch

    return Encoding({name: torch.from_numpy(array) for name, array in arrays.items()})


def _pad(row: list[int], fill: int, gap: int, left: bool) -> list[int]:
    return [fill] * gap + row if left else row + [fill] * gap
