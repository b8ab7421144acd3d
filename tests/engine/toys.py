"""Doubles: a model whose logits are a hash of what its cache holds, and the strategies that tests drive it with."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from mnemos.contract import Batch, KVLayout, ModelSpec, Output

VOCABULARY = 97


class ToyCache:
    """One integer a position: the token that was written there, or garbage."""

    def __init__(self, layout: KVLayout, pages: int) -> None:
        self.layout = layout
        self.pages = pages
        self.tokens = np.full((pages, layout.page_size), -7, dtype=np.int64)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.tokens[list(targets)] = self.tokens[list(sources)]

    def read(self, page: int) -> np.ndarray:
        return self.tokens[page].copy().view(np.uint8)

    def write(self, page: int, content: np.ndarray) -> None:
        self.tokens[page] = content.view(np.int64)


class ToyModel:
    """Logits depend on every token that the window reaches, as read from the pages: a wrong page changes them."""

    def __init__(
        self, page_size: int = 4, context_length: int = 256, window: int = 0, fingerprint: str = "toy"
    ) -> None:
        layout = KVLayout(layers=1, kv_heads=1, head_dim=1, page_size=page_size)
        self.spec = ModelSpec(
            "toy", VOCABULARY, context_length, 2, layout, eos_token_ids=(0,), window=window, fingerprint=fingerprint
        )
        self.cache: ToyCache
        self.batches: list[Batch] = []
        self.fail_on: int | None = None  # a token id that makes forward raise

    def reserve(self, pages: int) -> None:
        self.cache = ToyCache(self.spec.layout, pages)

    def forward(self, batch: Batch) -> Output:
        self.batches.append(batch)
        if self.fail_on is not None and self.fail_on in batch.token_ids:
            raise ArithmeticError("the toy broke")
        size = self.spec.layout.page_size
        hidden = np.zeros((len(batch.token_ids), 2), dtype=np.float32)
        logits = np.zeros((len(batch.token_ids), VOCABULARY), dtype=np.float32)
        for s in range(batch.sequences):
            table = batch.pages[batch.page_starts[s] : batch.page_starts[s + 1]]
            firsts = batch.page_positions[batch.page_starts[s] : batch.page_starts[s + 1]].tolist()
            held = dict(zip(firsts, table.tolist(), strict=True))  # first position -> page
            assert firsts == sorted(held) and all(first % size == 0 for first in firsts)
            rows = range(batch.sequence_starts[s], batch.sequence_starts[s + 1])
            for row in rows:
                offset = int(batch.positions[row]) % size
                self.cache.tokens[held[batch.positions[row] - offset], offset] = batch.token_ids[row]
            for row in rows:
                position = int(batch.positions[row])
                first = max(0, position - self.spec.window + 1) if self.spec.window else 0
                seen = []
                for past in range(first, position + 1):
                    seen.append(int(self.cache.tokens[held[past - past % size], past % size]))
                logits[row], hidden[row] = toy_row(seen, position)
        logits, hidden = logits[batch.logit_rows], hidden[batch.logit_rows]
        if batch.greedy:  # no logits: whoever reads them has no business in such a batch
            return Output(logits[:, :0], hidden, logits.argmax(axis=1).astype(np.int32))
        return Output(logits, hidden)


def toy_row(seen: Sequence[int], position: int) -> tuple[np.ndarray, np.ndarray]:
    """The logits and the hidden state behind a text; end-of-text (0) is never likely."""
    state = 17 + position
    for token in seen:
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
    logits = ((np.arange(VOCABULARY) + 1) * (state % 65_521 + 1) % 9973 / 997).astype(np.float32)
    logits[0] = -5
    return logits, np.array([state % 1009, position], dtype=np.float32)


def toy_greedy(prompt: Sequence[int], count: int, window: int = 0) -> list[int]:
    """What greedy decoding gives without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        first = max(0, len(tokens) - window) if window else 0
        tokens.append(int(toy_row(tokens[first:], len(tokens) - 1)[0].argmax()))
    return tokens[len(prompt) :]


class SlowModel(ToyModel):
    """Waits in every step until the test lets it go on, so that what happens meanwhile is certain."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.permits = threading.Semaphore(0)
        self.entered = threading.Event()

    def forward(self, batch: Batch) -> Output:
        self.entered.set()
        assert self.permits.acquire(timeout=30)
        return super().forward(batch)

    def free(self) -> None:
        """No waiting from now on."""
        self.permits.release(1_000_000)


class LetterTokenizer:
    """Token i is the letter chr(32 + i); each letter is a token."""

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
