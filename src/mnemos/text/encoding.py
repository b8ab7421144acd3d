"""Texts as padded batches of token ids, in the form that programs for other libraries' tokenizers expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mnemos.errors import ConfigError, RequestError


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


def encode_texts(
    encode: Callable[[str], list[int]],
    texts: str | Sequence[str],
    pad_id: int,
    padding: bool,
    max_length: int | None,
    return_tensors: str | None,
) -> Encoding:
    """Encodes one text or several; see `Tokenizer.__call__`."""
    if return_tensors not in (None, "np", "pt"):
        raise ConfigError(f"return_tensors is {return_tensors!r}; expected 'np', 'pt' or None")
    single = isinstance(texts, str)
    wanted = [texts] if isinstance(texts, str) else list(texts)
    if not wanted:
        raise RequestError("there is no text to encode; give at least one")
    rows = [encode(text)[-max_length:] if max_length else encode(text) for text in wanted]
    longest = max(map(len, rows))
    if not padding and return_tensors is not None and any(len(row) < longest for row in rows):
        raise ConfigError(
            f"return_tensors is {return_tensors!r} and the texts have {min(map(len, rows))} to {longest} tokens; "
            "rows of one length need padding=True"
        )
    gaps = [longest - len(row) if padding else 0 for row in rows]
    masks = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    rows = [[pad_id] * gap + row for gap, row in zip(gaps, rows, strict=True)]
    if return_tensors is None:
        return Encoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)
    arrays = {"input_ids": np.array(rows, np.int64), "attention_mask": np.array(masks, np.int64)}
    if return_tensors == "np":
        return Encoding(arrays)
    import torch

    return Encoding({name: torch.from_numpy(array) for name, array in arrays.items()})
