"""One step's ragged batch while it is put together."""

from __future__ import annotations

from array import array

import numpy as np

from mnemos.contract import Batch, Ints
from mnemos.engine.request import Request
from mnemos.engine.sequence import Sequence
from mnemos.memory.states import NO_STATE

NO_MEMORIES = np.empty((0, 3), dtype=np.int32)
Part = tuple[Sequence, int, int, int]  # sequence, rows, first and end of its wanted rows in the output
Item = tuple[Request, list[Part], bool]  # with whether its parts complete the rows that the strategy waits for


class Step:
    """Rows of many requests.

    items: each request with its parts, and whether they complete the rows that its strategy waits for.
    greedy: whether only the most probable token is wanted for every wanted row.
    known: in a greedy step, only ids below it are wanted; None: all.
    early_layers: layers of whose input logits are wanted too.
    """

    __slots__ = (
        "adapters",
        "decode_rows",
        "early_layers",
        "greedy",
        "items",
        "known",
        "logit_rows",
        "memories",
        "page_positions",
        "page_starts",
        "pages",
        "positions",
        "prefill_rows",
        "sequence_starts",
        "states",
        "token_ids",
    )

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.sequence_starts = [0]
        self.pages = array("i")
        self.page_positions = array("i")
        self.page_starts = [0]
        self.logit_rows: list[int] = []
        self.states: list[int] = []
        self.adapters: list[int] = []
        self.memories: list[tuple[int, int, int] | None] = []
        self.decode_rows = 0
        self.prefill_rows = 0
        self.greedy = True
        self.known: int | None = None
        self.early_layers: tuple[int, ...] = ()

    def add(self, request: Request, planned: list[tuple[Sequence, int]], rows: int) -> None:
        """Takes the next positions of a request's sequences, `rows` in total; their pages are allocated."""
        self.adapters += [request.adapter] * len(planned)
        self.memories += [request.memory] * len(planned)
        parts, complete = [self._add(*part) for part in planned], rows == request.pending
        self.items.append((request, parts, complete))
        for sequence, _, start, end in parts:
            if start < end:
                self._keep_greedy(sequence, alone=complete and not sequence.parts)
        if request.prefilling:
            self.prefill_rows += rows
        else:
            self.decode_rows += rows

    def add_one(self, request: Request, sequence: Sequence) -> None:
        """Takes the next position of a request that decodes one text; it is the row that its strategy waits for."""
        done, asked = sequence.done, len(self.logit_rows)
        self.items.append((request, [(sequence, 1, asked, asked + 1)], True))
        self.adapters.append(request.adapter)
        self.memories.append(request.memory)
        self.logit_rows.append(len(self.token_ids))
        self.token_ids.append(sequence.branch.tokens[done + sequence.dropped])
        self.positions.append(done)
        self.sequence_starts.append(len(self.token_ids))
        self._add_table(sequence)
        self.decode_rows += 1
        self._keep_greedy(sequence, alone=True)

    def _add(self, sequence: Sequence, rows: int) -> Part:
        done = sequence.done
        row = len(self.token_ids)
        self.token_ids += sequence.next_tokens(rows)
        self.positions += range(done, done + rows)
        self.sequence_starts.append(row + rows)
        self._add_table(sequence)
        asked = len(self.logit_rows)
        if done + rows > sequence.first and not sequence.resume:
            self.logit_rows += range(row + max(0, sequence.first - done), row + rows)
        return sequence, rows, asked, len(self.logit_rows)

    def _add_table(self, sequence: Sequence) -> None:
        """Adds the sequence's page tables and its state slot."""
        for own in sequence.groups:
            self.pages += own.pages
            self.page_positions += own.positions
            self.page_starts.append(len(self.pages))
        if sequence.state != NO_STATE:
            self.states.append(sequence.state)

    def _keep_greedy(self, sequence: Sequence, alone: bool) -> None:
        """Leaves the step greedy if the sequence's strategy reads nothing of its rows but the most probable tokens.

        alone: it has read no other rows, and will read these before others.
        """
        branch = sequence.branch
        draw = branch.draw
        if draw is None or draw.cutoffs is not None or branch.logits or not alone:
            self.greedy = False
            if branch.early_layers:
                self.early_layers = tuple(sorted({*self.early_layers, *branch.early_layers}))
        elif draw.known is not None:
            self.known = draw.known if self.known is None else min(self.known, draw.known)

    def batch(self) -> Batch:
        return Batch(
            token_ids=np.array(self.token_ids, dtype=np.int32),
            positions=np.array(self.positions, dtype=np.int32),
            sequence_starts=np.array(self.sequence_starts, dtype=np.int32),
            pages=np.frombuffer(self.pages, dtype=np.int32),
            page_positions=np.frombuffer(self.page_positions, dtype=np.int32),
            page_starts=np.array(self.page_starts, dtype=np.int32),
            logit_rows=np.array(self.logit_rows, dtype=np.int32),
            greedy=self.greedy,
            states=np.array(self.states, dtype=np.int32),
            adapters=np.array(self.adapters if max(self.adapters, default=-1) >= 0 else (), dtype=np.int32),
            early_layers=self.early_layers,
            memories=self._memories(),
        )

    def _memories(self) -> Ints:
        if not any(self.memories):
            return NO_MEMORIES
        return np.array([own or (0, 0, 0) for own in self.memories], dtype=np.int32)
