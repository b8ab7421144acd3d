"""What goes into a model's forward pass and what comes out: the contract between engine, models and ops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """One ragged step: the new tokens of S sequences, one after the other, without padding. All arrays are int32.

    token_ids (T,), positions (T,)   consecutive within a sequence
    sequence_starts (S+1,)           sequence s owns rows sequence_starts[s]:sequence_starts[s+1]
    pages (P,), page_starts (S+1,)   sequence s keeps position p in page
                                     pages[page_starts[s] + p // page_size], at slot p % page_size;
                                     a page that no layer's window reaches any more may be -1
    logit_rows (R,)                  the rows whose logits (and last hidden states) are asked for
    greedy                           of their logits only the most probable tokens are wanted
    conditions                       what the model's `begin` made of each sequence's prompt; () for models without it
    """

    token_ids: Ints
    positions: Ints
    sequence_starts: Ints
    pages: Ints
    page_starts: Ints
    logit_rows: Ints
    greedy: bool = False
    conditions: tuple[object, ...] = ()

    @property
    def sequences(self) -> int:
        return len(self.sequence_starts) - 1


@dataclass(frozen=True)
class Output:
    """logits (R, vocabulary) and hidden (R, hidden size), float32, for the rows that the batch asked for.

    `hidden` is what the output projection reads (after the last norm). Both may be views of a
    workspace that the next forward pass overwrites.

    For a batch with `greedy`, a model that finds the most probable tokens without computing all logits gives them as
    `tokens` (R,), of equally probable ones the lowest id, and logits of shape (R, 0).
    """

    logits: Floats
    hidden: Floats
    tokens: Ints | None = None


@dataclass(frozen=True)
class KVLayout:
    """The shape of a model's key/value cache. A page holds `page_size` positions of every layer."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int = 32
    dtype: str = "float16"  # float32, float16, bfloat16 or int8 (one scale for each position and head)

    @property
    def page_bytes(self) -> int:
        values = 2 * self.layers * self.kv_heads * self.page_size
        width = {"float32": 4 * self.head_dim, "float16": 2 * self.head_dim, "bfloat16": 2 * self.head_dim}
        return values * width.get(self.dtype, self.head_dim + 4)


@dataclass(frozen=True)
class AttentionParams:
    """Causal grouped-query attention. Query i sees key j when j <= i and, with a window, i - j < window."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # 0: no limit
    softcap: float = 0.0  # 0: none; else scores become cap * tanh(scores / cap)


@dataclass(frozen=True, eq=False)
class RopeParams:
    """Rotary embedding in the half-split ("neox") order: element i is paired with element i + rotary_dim / 2.

    `frequencies` (rotary_dim / 2,) float32: radians a position; `magnitude` multiplies both functions (YaRN, LongRoPE).
    The elements of a head behind rotary_dim pass unchanged. Source: Su et al. 2021, arXiv:2104.09864.
    """

    head_dim: int
    rotary_dim: int
    frequencies: Floats
    magnitude: float = 1.0
