"""The contracts between packages: batches, outputs, caches, and everything the engine knows about a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """One ragged step: the new tokens of S sequences, one after the other, without padding. All arrays are int32.

    token_ids (T,), positions (T,)   consecutive within a sequence
    sequence_starts (S+1,)           sequence s owns rows sequence_starts[s]:sequence_starts[s+1]
    pages (P,), page_starts (S*G+1,) a sequence has a page table for each of the G layer groups of `KVLayout`: that of
                                     sequence s and group g is pages[page_starts[i]:page_starts[i+1]], i = s*G + g, and
                                     names pages of that group
    page_positions (P,)              the first position of each page, a multiple of the page size: position p is in the
                                     page with page_positions <= p < page_positions + page_size, at slot p % page_size.
                                     They ascend within a table and may have gaps: a row sees the positions up to its
                                     own, within its layer's window, that the table's pages hold, and no others. Every
                                     new position has a page.
    logit_rows (R,)                  the rows whose logits (and last hidden states) are wanted, ascending
    greedy                           only the most probable tokens of those rows are wanted
    states (S,)                      each sequence's state slot, all different; empty for a model without `spec.states`
    memories (S, 3)                  what each sequence's rows see, in pages: window, recalled pages and sinks, in place
                                     of those of the cache's `layout.recall`; zeros: as there; empty: all as there
    adapters (S,)                    the adapter of each sequence, a number in `spec.adapters` or -1; empty: no adapters
    early_layers                     layers below `spec.layers` of whose input logits are wanted too, for the same rows
    """

    token_ids: Ints
    positions: Ints
    sequence_starts: Ints
    pages: Ints
    page_positions: Ints
    page_starts: Ints
    logit_rows: Ints
    greedy: bool = False
    states: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    adapters: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    early_layers: tuple[int, ...] = ()
    memories: Ints = field(default_factory=lambda: np.empty((0, 3), np.int32))

    @property
    def sequences(self) -> int:
        return len(self.sequence_starts) - 1

    def table(self, sequence: int, group: int, groups: int) -> slice:
        """Where a sequence's page table in one of `groups` layer groups is in `pages` and `page_positions`."""
        index = sequence * groups + group
        return slice(self.page_starts[index], self.page_starts[index + 1])

    def row_adapters(self, rows: int) -> Ints:
        """The adapter of each row of a value that has `rows` rows: one for each token, or for each of `logit_rows`."""
        adapters = self.adapters if len(self.adapters) else np.full(self.sequences, -1, np.int32)
        by_token = np.repeat(adapters, np.diff(self.sequence_starts))
        return by_token if rows == len(by_token) else by_token[self.logit_rows]

    def part(self, first: int, last: int) -> Batch:
        """A batch of only the sequences `first` to `last` - 1."""
        begin, end = self.sequence_starts[first], self.sequence_starts[last]
        groups = (len(self.page_starts) - 1) // self.sequences
        page_starts = self.page_starts[first * groups : last * groups + 1]
        pages = slice(page_starts[0], page_starts[-1])
        asked = slice(*np.searchsorted(self.logit_rows, (begin, end)))
        return replace(
            self,
            token_ids=self.token_ids[begin:end],
            positions=self.positions[begin:end],
            sequence_starts=self.sequence_starts[first : last + 1] - begin,
            pages=self.pages[pages],
            page_positions=self.page_positions[pages],
            page_starts=page_starts - page_starts[0],
            logit_rows=self.logit_rows[asked] - begin,
            states=self.states[first:last],
            adapters=self.adapters[first:last],
            memories=self.memories[first:last],
        )


@dataclass(frozen=True)
class Output:
    """logits (R, vocabulary) and hidden (R, hidden size), float32, for the rows in `Batch.logit_rows`.

    `hidden` is the input of the output projection (after the last norm). Both may be views of a
    workspace that the next forward pass overwrites.

    For a batch with `greedy`, a model that finds the most probable tokens without computing all logits returns them as
    `tokens` (R,), the lowest id on ties, and logits of shape (R, 0).

    For a batch with `early_layers`, `early` (layers, R, vocabulary) is the output projection of their inputs.
    """

    logits: Floats
    hidden: Floats
    tokens: Ints | None = None
    early: Floats | None = None


@dataclass(frozen=True)
class LayerGroup:
    """Layers that see equally far back: `window` positions, 0 without a limit. Their keys and values share pages."""

    window: int
    layers: tuple[int, ...]
    page_bytes: int


@dataclass(frozen=True)
class Recall:
    """What a row of a long text sees, in layers without a window of their own. All sizes are multiples of a page.

    Every row sees the pages of the text's first `sinks` positions and those of its last `window`, its own page
    included. In a key/value head that recalls, it also sees those `recall` / page_size of the pages between that suit
    it best: a page's score is the largest dot product, in integers, of one of its keys in 3 bits with one of the row's
    queries in 8 that name pages, and on exact ties the lower page is taken (`seen_pages` in ops/recall.py). In any
    other head its window is longer by `recall`. So every head sees as many pages, and all of a text of up to
    `positions`.

    farthest: a row sees pages that are more than this many positions before its own as if it stood this many positions
    after them, with its queries rotated so; 0: at their true distance.

    heads: for each layer, the key/value heads that recall, ascending. components: those of a key and a query that
    scores are computed of, see `ModelSpec.slow_components`. naming: for each layer and each of its key/value heads,
    which queries of its group name pages, ascending; empty, as a whole or for a head: all of them. measured: whether
    the cache measures what is `recalled`. Nothing depends on other rows, on how a text is cut into steps, or on where
    its pages are stored.
    """

    window: int
    recall: int
    sinks: int
    heads: tuple[tuple[int, ...], ...]
    components: tuple[int, ...]
    farthest: int = 0
    naming: tuple[tuple[tuple[int, ...], ...], ...] = ()
    measured: bool = False

    def naming_of(self, layer: int, head: int) -> tuple[int, ...]:
        """Which queries of a head name pages; empty: all of them."""
        return self.naming[layer][head] if self.naming else ()

    @property
    def positions(self) -> int:
        """How many positions a row sees, its own page counted whole."""
        return self.sinks + self.recall + self.window


@dataclass(frozen=True)
class KVLayout:
    """The shape of a model's key/value cache. A page holds `page_size` positions of all layers of one group.

    windows: for each layer, how many positions back it sees, 0 without a limit; empty: no layer has a limit. Layers
    with the same window form a group, with page ids of its own, so that a sequence can drop the pages that a group's
    window has left while other groups keep theirs.

    recall: how layers without a limit see long texts; None: whole. The heads that recall have an index of their keys.

    A model with 0 layers here has no pages (see `NO_PAGES`): it keeps everything about a sequence in its state slot.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int = 32
    dtype: str = "float16"  # float32, float16, bfloat16 or int8 (one scale per position and head)
    windows: tuple[int, ...] = ()
    recall: Recall | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes of `page_size` positions of every layer, without an index."""
        values = 2 * self.layers * self.kv_heads * self.page_size
        width = {"float32": 4 * self.head_dim, "float16": 2 * self.head_dim, "bfloat16": 2 * self.head_dim}
        return values * width.get(self.dtype, self.head_dim + 4)

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, the one that sees farthest back first; one without layers if there are no pages."""
        windows = self.windows or (0,) * self.layers
        farthest_first = sorted(set(windows) or {0}, key=lambda window: (window > 0, -window))
        members = [tuple(layer for layer, own in enumerate(windows) if own == window) for window in farthest_first]
        return tuple(
            LayerGroup(window, layers, len(layers) * self.page_bytes // max(self.layers, 1) + self._index_bytes(layers))
            for window, layers in zip(farthest_first, members, strict=True)
        )

    def _index_bytes(self, layers: tuple[int, ...]) -> int:
        """Bytes of a page's index: for 32 keys, 3 bits a component, its lowest value and its step, and a scale."""
        if self.recall is None:
            return 0
        heads = sum(len(self.recall.heads[layer]) for layer in layers)
        return heads * self.page_size // 32 * (-(-len(self.recall.components) // 16) * 224 + 4)

    def place(self, layer: int) -> tuple[int, int]:
        """The number of a layer's group, and the layer's number in the group."""
        for number, group in enumerate(self.groups):
            if layer in group.layers:
                return number, group.layers.index(layer)
        return 0, layer  # there is no such layer; whoever stores it reports that

    def counts(self, pages: int | Sequence[int]) -> tuple[int, ...]:
        """A number of pages for each group; a single number is that of every group."""
        return (pages,) * len(self.groups) if isinstance(pages, int) else tuple(pages)


WHOLE_TEXT = 1 << 30  # a window, in positions, that no text exceeds; a multiple of a page
NO_PAGES = KVLayout(layers=0, kv_heads=0, head_dim=0)


class Cache(Protocol):
    """Key/value storage for a fixed number of pages of each layer group; the engine decides which sequence owns which.

    `pages` has a number for each group. `group` is the number of the group whose pages the arguments name.
    """

    layout: KVLayout
    pages: tuple[int, ...]

    def copy(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        """Copies whole pages, for all layers of the group."""

    def read(self, page: int, group: int = 0) -> npt.NDArray[np.uint8]:
        """The page's content as flat bytes, in a form that `write` accepts with the same backend and layout."""

    def write(self, page: int, content: npt.NDArray[np.uint8], group: int = 0) -> None: ...


@runtime_checkable
class ReleasingCache(Protocol):
    """A cache that can give the memory of pages back to the system."""

    def release(self, pages: Sequence[int], group: int = 0) -> None:
        """Gives back the memory of pages that nobody uses; their content is lost."""


@runtime_checkable
class FillingCache(Protocol):
    """A cache whose pages any thread may write, not only that in which the model runs."""

    def fill(self, page: int, content: npt.NDArray[np.uint8], group: int = 0) -> None:
        """`Cache.write`, at any time, for a page that nobody else uses."""


class RecallingCache(Cache, Protocol):
    """The cache of a model that `recalls`."""

    def begin_recall(self, recall: Recall) -> None:
        """For a cache without a `layout.recall`, which gets this one: pages that are filled later have an index.

        A sequence's rows see pages that were filled before only as long as they see all of their text.
        """

    def recalled(self) -> Floats:
        """With `Recall.measured`, what rows that did not see all of their text have recalled, (2, layers, kv_heads,
        group), as means for each layer, key/value head and query of its group: which share of their attention went
        there, and how far that has moved their result from what the other positions that they saw would have given.
        0 where there were no such rows; no group where no attention was computed."""


@runtime_checkable
class SpillingCache(Protocol):
    """A cache that can move pages that no row sees unless it recalls them to a file."""

    def spill(self, folder: Path) -> None:
        """Does so from now on, with a file in this folder; ConfigError if none can be made there.

        Results stay the same. A page that a window needs again is brought back. CapacityError from a step if the file
        cannot take a page.
        """

    @property
    def spilled(self) -> int:
        """How many pages are in the file alone."""


@dataclass(frozen=True)
class TokenRules:
    """The model authors' rules for what texts must or must not contain; see `GenerationConfig` for the meanings."""

    forced_bos: tuple[int, ...] = ()
    forced_eos: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class FirstLogits:
    """What a model once answered: some logits of the token after a prompt, by which it can be recognized.

    prompt: token ids; tokens: a few ids; logits: theirs; spread: the largest logit less the smallest of all tokens.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: tuple[float, ...]
    spread: float


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a model that requests are checked against, and what it promises, which the engine obeys.

    `position_limit` is the first position that it cannot take, if attention depends on distances alone, so that
    positions may grow as long as no row sees more than the context; 0: they end with the context. `fingerprint` changes
    whenever the weights or the computation do; saved caches are bound to it. `layers` is the number of layers that
    `Batch.early_layers` may name, 0 for a model that does not show them; `tied_embeddings` says whether its output
    projection is its embedding. `adapters` are the names of those that `Batch.adapters` may choose. `first_logits` is
    what its package was made with, which an engine compares at its start.

    The promises are about logits: batch invariance holds for a model as far as its promises go.

    chunks           a prompt may be evaluated in pieces, over several steps; if not, one step takes all of it
    shares_prefixes  keys and values of one sequence may be used for another that begins with the same tokens
    verifies_drafts  the logits of several new positions in one step equal those of one position per step; if not,
                     speculation is refused
    batches          one call may hold rows of several sequences; if not, every batch holds one sequence
    states           each sequence carries state besides its pages: the model is a `StatefulModel`, and no prefix tree
                     is kept, since a state belongs to one position
    rewinds          for a model with states: a state that has gone beyond a batch's first position returns to it by
                     itself; if not, the engine evaluates such a sequence again, from its first token in a new slot
    rewind_limit     by how many positions at most it returns by itself; 0: by any number
    recalls          its attention obeys `layout.recall`, where that is set before pages are reserved
    pools_prompts    what is computed for a prompt depends on all of it: the call that begins a sequence ends with the
                     prompt's last token, also when the sequence is evaluated again, and does not chunk
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
    position_limit: int = 0
    parameters: int = 0
    fingerprint: str = ""
    chunks: bool = True
    shares_prefixes: bool = True
    verifies_drafts: bool = True
    batches: bool = True
    states: bool = False
    rewinds: bool = True
    rewind_limit: int = 0
    recalls: bool = False
    pools_prompts: bool = False
    layers: int = 0
    tied_embeddings: bool = False
    adapters: tuple[str, ...] = ()
    slow_components: tuple[int, ...] = ()
    first_logits: FirstLogits | None = None
    details: dict[str, object] = field(default_factory=dict)  # for `inspect`: name and license

    @property
    def window(self) -> int:
        """How many positions back the attention of any layer reaches, 0 without such a limit."""
        return self.layout.groups[0].window


class Model(Protocol):
    """Any causal language model: built-in architectures, adapters for foreign modules and test doubles.

    It is also a `PagedModel` unless its layout has 0 layers, and a `StatefulModel` if `spec.states`.
    """

    spec: ModelSpec

    def forward(self, batch: Batch) -> Output: ...


@runtime_checkable
class ThreadedModel(Protocol):
    """A model whose threads can be limited while it runs."""

    @property
    def threads(self) -> int | None:
        """How many threads a step has at most, without a limit; None where its backend cannot limit them."""

    def limit_threads(self, threads: int) -> None:
        """Steps have at most this many threads from now on. Called in the thread that calls `forward`."""


class PagedModel(Model, Protocol):
    """A model whose keys and values are stored in cache pages."""

    @property
    def cache(self) -> Cache: ...

    def reserve(self, pages: int | Sequence[int]) -> None:
        """Allocates cache pages of spec.layout; called once, before the first forward.

        pages: how many for each layer group; a single number is that of every group.
        """


@runtime_checkable
class SpillingModel(Protocol):
    """A model with a `SpillingCache`.

    spill_folder: where `reserve` has it store what leaves memory; None: everything stays there.
    """

    spill_folder: Path | None


class StatefulModel(Model, Protocol):
    """A model that keeps a slot of state for each sequence: a recurrent state, an encoder's output, a foreign cache.

    A sequence has one slot from its first token to its end; `Batch.states` names it. The engine forks a sequence by
    `copy_states` before either side writes, and clears the slots of sequences that end, are preempted or restart. A
    batch's first position in a sequence is the number of tokens that its state must hold: exactly that many, or more if
    the model `rewinds`; at position 0 it restarts, and keeps what `ConditionedModel.begin` has put there.
    """

    def reserve_states(self, slots: int) -> None:
        """Allocates slots 0 to `slots` - 1, all clear; called once, before the first forward.

        Low slots are used first, and usually only a few: it is better to allocate memory when a slot is first written.
        """

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the content of the sources into the targets, which are clear."""

    def clear_states(self, slots: Sequence[int]) -> None:
        """Clears these slots and frees their memory; a slot that is already clear stays clear."""


@runtime_checkable
class ConditionedModel(Protocol):
    """A stateful model that reads its prompt with an encoder, as encoder-decoder models do."""

    def start_tokens(self, prompt: Sequence[int]) -> list[int]:
        """The tokens that generation begins with; cheap, called in the caller's thread."""

    def begin(self, state: int, prompt: Sequence[int]) -> None:
        """Reads the prompt into a clear slot, before the first token of its sequence is evaluated.

        Called in the engine's thread, and again after preemption; forks get it by `copy_states`. An exception ends
        this request and no other.
        """
