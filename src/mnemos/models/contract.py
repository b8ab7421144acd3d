"""All that the engine knows about a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mnemos.ops.batch import Batch, KVLayout, Output
from mnemos.ops.protocol import Cache


@dataclass(frozen=True)
class TokenRules:
    """What the makers of a model say that its texts must or must not hold; see `GenerationConfig` for the meanings."""

    forced_bos: tuple[int, ...] = ()
    forced_eos: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a model that requests are checked against.

    `window` is the number of positions that its attention reaches back, 0 without such a limit (or where only some
    layers have one). `fingerprint` changes whenever the weights or the computation do; saved caches are bound to it.
    """

    architecture: str
    vocabulary_size: int
    context_length: int
    hidden_size: int
    layout: KVLayout
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    token_rules: TokenRules = TokenRules()
    window: int = 0
    parameters: int = 0
    fingerprint: str = ""
    details: dict[str, object] = field(default_factory=dict)  # for `inspect`: licence, name, quantization, ...


class Model(Protocol):
    """Any causal language model. Built-in architectures, adapters for foreign modules and test doubles all are one."""

    spec: ModelSpec

    @property
    def cache(self) -> Cache: ...

    def reserve(self, pages: int) -> None:
        """Makes room for `pages` cache pages of spec.layout; called once, before the first forward."""

    def forward(self, batch: Batch) -> Output: ...


@runtime_checkable
class ConditionedModel(Protocol):
    """A model that reads the prompt apart from what it generates, as encoder-decoder models do."""

    def begin(self, prompt: Sequence[int]) -> tuple[object, list[int]]:
        """(what every batch is to carry in `conditions` for this request, the tokens that generation begins with)."""
