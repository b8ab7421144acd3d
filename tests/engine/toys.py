"""Test doubles: models whose logits are a hash of their pages' or states' content, and letter tokenizers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from mnemos.contract import NO_PAGES, Batch, KVLayout, ModelSpec, Output

VOCABULARY = 97
FACTOR, MODULUS = 1_000_003, 2_147_483_647
UNREADABLE = 95  # a token that a ReaderToy cannot read


Windows = int | tuple[int, ...]  # one layer's, or those of several; 0: no limit


class ToyCache:
    """One integer per position and layer group: the token that was written there, or garbage."""

    def __init__(self, layout: KVLayout, pages: int | Sequence[int]) -> None:
        self.layout = layout
        self.pages = layout.counts(pages)
        self.tokens = [np.full((count, layout.page_size), -7, dtype=np.int64) for count in self.pages]

    def copy(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        self.tokens[group][list(targets)] = self.tokens[group][list(sources)]

    def read(self, page: int, group: int = 0) -> np.ndarray:
        return self.tokens[group][page].copy().view(np.uint8)

    def write(self, page: int, content: np.ndarray, group: int = 0) -> None:
        self.tokens[group][page] = content.view(np.int64)


class ToyModel:
    """Logits depend on every token that each layer's window reaches, as read from its group's pages: a wrong page
    changes them.

    drops: the layout says which layers have windows; if not, the engine keeps all pages.
    """

    def __init__(
        self,
        page_size: int = 4,
        context_length: int = 256,
        window: Windows = 0,
        fingerprint: str = "toy",
        position_limit: int = 0,
        drops: bool = True,
        **promises: bool,
    ) -> None:
        self.windows = window if isinstance(window, tuple) else (window,)
        stated = self.windows if drops else ()
        layout = KVLayout(layers=len(self.windows), kv_heads=1, head_dim=1, page_size=page_size, windows=stated)
        self.spec = ModelSpec(
            "toy",
            VOCABULARY,
            context_length,
            2,
            layout,
            eos_token_ids=(0,),
            position_limit=position_limit,
            fingerprint=fingerprint,
            **promises,
        )
        self.cache: ToyCache
        self.batches: list[Batch] = []
        self.fail_on: int | None = None  # a token id that makes forward raise

    def reserve(self, pages: int | Sequence[int]) -> None:
        self.cache = ToyCache(self.spec.layout, pages)

    def forward(self, batch: Batch) -> Output:
        self.batches.append(batch)
        if self.fail_on is not None and self.fail_on in batch.token_ids:
            raise ArithmeticError("the toy broke")
        hidden = np.zeros((len(batch.token_ids), 2), dtype=np.float32)
        logits = np.zeros((len(batch.token_ids), VOCABULARY), dtype=np.float32)
        for s in range(batch.sequences):
            rows = range(batch.sequence_starts[s], batch.sequence_starts[s + 1])
            seen = [self._attend(batch, s, layer) for layer in range(len(self.windows))]
            for row, of_layers in zip(rows, zip(*seen, strict=True), strict=True):
                logits[row], hidden[row] = row_of_layers(of_layers, int(batch.positions[row]))
        logits, hidden = logits[batch.logit_rows], hidden[batch.logit_rows]
        if batch.greedy:  # no logits: nothing that reads them belongs in such a batch
            return Output(logits[:, :0], hidden, logits.argmax(axis=1).astype(np.int32))
        return Output(logits, hidden)

    def _attend(self, batch: Batch, s: int, layer: int) -> list[list[int]]:
        """Stores a sequence's new tokens in a layer's pages; returns the tokens that each of its rows sees there."""
        layout, window = self.spec.layout, self.windows[layer]
        group, size = layout.place(layer)[0], layout.page_size
        tokens, table = self.cache.tokens[group], batch.table(s, group, len(layout.groups))
        firsts = batch.page_positions[table].tolist()
        held = dict(zip(firsts, batch.pages[table].tolist(), strict=True))  # first position -> page
        assert firsts == sorted(held) and all(first % size == 0 for first in firsts)
        rows = range(batch.sequence_starts[s], batch.sequence_starts[s + 1])
        for row in rows:
            offset = int(batch.positions[row]) % size
            tokens[held[batch.positions[row] - offset], offset] = batch.token_ids[row]
        seen = []
        for position in batch.positions[rows.start : rows.stop].tolist():
            first = max(0, position - window + 1) if window else 0
            past = [p for start in firsts for p in range(start, start + size) if first <= p <= position]
            seen.append([int(tokens[held[p - p % size], p % size]) for p in past])
        return seen


class StateToy:
    """A double without pages: each state slot holds sums over the tokens read so far, and the logits are a ToyModel's.

    With `rewinds` a slot keeps the sum after each token, so that it can go back; without, only the last one.
    """

    def __init__(self, context_length: int = 256, rewinds: bool = True, **promises: bool) -> None:
        self.spec = ModelSpec(
            "toy",
            VOCABULARY,
            context_length,
            2,
            NO_PAGES,
            eos_token_ids=(0,),
            states=True,
            rewinds=rewinds,
            **promises,
        )
        self.sums: list[list[int]] = []
        self.batches: list[Batch] = []
        self.copies = 0
        self.fail_on: int | None = None

    def reserve_states(self, slots: int) -> None:
        self.sums = [[0] for _ in range(slots)]

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            assert self.sums[target] == [0]
            self.sums[target] = list(self.sums[source])
            self.copies += 1

    def clear_states(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.sums[slot] = [0]

    def filled_states(self) -> set[int]:
        return {slot for slot, sums in enumerate(self.sums) if sums != [0]}

    def forward(self, batch: Batch) -> Output:
        self.batches.append(batch)
        if self.fail_on is not None and self.fail_on in batch.token_ids:
            raise ArithmeticError("the toy broke")
        assert len(batch.pages) == 0
        assert len(batch.states) == len(set(batch.states.tolist())) == batch.sequences
        rows = []
        for s, state in enumerate(batch.states):
            sums = self.sums[state]
            for row in range(batch.sequence_starts[s], batch.sequence_starts[s + 1]):
                position = int(batch.positions[row])
                assert position <= len(sums) - 1 if self.spec.rewinds else position == len(sums) - 1
                del sums[position + 1 :]
                sums.append((sums[-1] * FACTOR + int(batch.token_ids[row]) + 1) % MODULUS)
                rows.append(row_of_sum(sums[-1], position + 1, position))
        asked = [rows[row] for row in batch.logit_rows]
        logits = np.array([row[0] for row in asked], np.float32).reshape(-1, VOCABULARY)
        return Output(logits, np.array([row[1] for row in asked], np.float32).reshape(-1, 2))


class ReaderToy(StateToy):
    """A double with an encoder: the sum of a sequence's state begins with its source."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.read: list[list[int]] = []

    def start_tokens(self, prompt: Sequence[int]) -> list[int]:
        return [3]

    def begin(self, state: int, prompt: Sequence[int]) -> None:
        if UNREADABLE in prompt:
            raise ArithmeticError("the toy cannot read this")
        assert self.sums[state] == [0]
        self.read.append(list(prompt))
        self.sums[state] = [1 + sum(prompt)]


def reader_greedy(source: Sequence[int], count: int) -> list[int]:
    """A ReaderToy's text after its start token, without an engine."""
    tokens, total = [3], 1 + sum(source)
    for position in range(count):
        total = (total * FACTOR + tokens[-1] + 1) % MODULUS
        tokens.append(int(row_of_sum(total, position + 1, position)[0].argmax()))
    return tokens[1:]


def toy_row(seen: Sequence[int], position: int) -> tuple[np.ndarray, np.ndarray]:
    """The logits and the hidden state after a text; end-of-text (0) is never likely."""
    total = 0
    for token in seen:
        total = (total * FACTOR + token + 1) % MODULUS
    return row_of_sum(total, len(seen), position)


def row_of_layers(seen: Sequence[Sequence[int]], position: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of a position whose layers see these tokens."""
    joined = [token for tokens in seen for token in [*tokens, VOCABULARY]][:-1]
    return toy_row(joined, position)


def toy_text_row(tokens: Sequence[int], position: int, window: Windows = 0) -> tuple[np.ndarray, np.ndarray]:
    """The row of a position of a text."""
    windows = window if isinstance(window, tuple) else (window,)
    firsts = [max(0, position - one + 1) if one else 0 for one in windows]
    return row_of_layers([tokens[first : position + 1] for first in firsts], position)


def row_of_sum(total: int, count: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """A row of the position after `count` tokens that have this sum."""
    state = ((17 + position) * pow(FACTOR, count, MODULUS) + total) % MODULUS
    logits = ((np.arange(VOCABULARY) + 1) * (state % 65_521 + 1) % 9973 / 997).astype(np.float32)
    logits[0] = -5
    return logits, np.array([state % 1009, position], dtype=np.float32)


def toy_greedy(prompt: Sequence[int], count: int, window: Windows = 0) -> list[int]:
    """The result of greedy decoding, without an engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(toy_text_row(tokens, len(tokens) - 1, window)[0].argmax()))
    return tokens[len(prompt) :]


class SlowModel(ToyModel):
    """Waits in every step until the test lets it continue, so that timing is deterministic."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.permits = threading.Semaphore(0)
        self.entered = threading.Event()

    def forward(self, batch: Batch) -> Output:
        self.entered.set()
        assert self.permits.acquire(timeout=30)
        return super().forward(batch)

    def free(self) -> None:
        """Stops waiting from now on."""
        self.permits.release(1_000_000)


class LetterTokenizer:
    """Token i is the letter chr(32 + i); every letter is a token."""

    vocabulary_size = VOCABULARY

    special_ids = frozenset[int]()

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, continues: bool = False
    ) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: Sequence[int], skip_special: bool = True, continues: bool = False) -> str:
        return "".join(chr(32 + token) for token in ids)

    def decoder(self, skip_special: bool = True, continues: bool = False) -> LetterDecoder:
        return LetterDecoder()

    def token_bytes(self, token_id: int) -> bytes:
        return chr(32 + token_id).encode()


class LetterDecoder:
    """Holds every second letter back, as decoders do with half characters."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token_id: int) -> str:
        self.held += chr(32 + token_id)
        if len(self.held) < 2:
            return ""
        piece, self.held = self.held, ""
        return piece

    def finish(self) -> str:
        piece, self.held = self.held, ""
        return piece
