"""A branch in the cache: which positions are evaluated, and which its strategy waits for."""

from __future__ import annotations

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.strategy import Branch, Rows
from mnemos.engine.sliding import SINKS
from mnemos.memory.page_table import PageTable


class Sequence(PageTable):
    """A branch in the cache. Lengths are positions: tokens, less those that an endless text dropped when it restarted.

    goal     positions that the cache must hold before the strategy is advanced again
    first    the first position whose row the strategy gets
    dropped  tokens that were cut out after the first SINKS ones when the text restarted
    start    the first position that an endless text has kept, after `sinks` positions with its first tokens; 0 before
             it slides
    resume   while the sinks are evaluated at their new positions: where the text continues after them; else 0
    seen     the branch's length when last complete; a lower count of the branch itself means that it was truncated
    leader   a sibling to share that many first positions with, once it has evaluated them
    chosen   the tokens that the branch's draw chose of this step's rows
    early    the latest rows of the branch's early layers; None if it has none
    """

    __slots__ = (
        "branch",
        "chosen",
        "dropped",
        "early",
        "first",
        "goal",
        "leader",
        "parts",
        "resume",
        "seen",
        "sinks",
        "start",
    )

    def __init__(self, branch: Branch, groups: int) -> None:
        super().__init__(groups)
        self.branch = branch
        self.goal = len(branch.tokens)
        self.first = 0
        self.dropped = 0
        self.start = 0
        self.sinks = 0
        self.resume = 0
        self.seen = 0
        self.leader: tuple[Sequence, int] | None = None
        self.parts: list[tuple[Floats, Floats]] = []
        self.chosen: list[int] | None = None
        self.early: Floats | None = None

    def tokens(self, start: int, stop: int) -> list[int]:
        """The token ids at the cached positions start to stop."""
        tokens, dropped = self.branch.tokens, self.dropped
        if not dropped or stop <= SINKS:
            return tokens[start:stop]
        head = tokens[start:SINKS]
        return head + tokens[max(start, SINKS) + dropped : stop + dropped]

    def position(self, evaluated: int) -> int:
        """How many cached positions the first `evaluated` tokens take."""
        if not self.dropped:
            return evaluated
        return evaluated - self.dropped if evaluated > SINKS + self.dropped else min(evaluated, SINKS)

    def valid(self) -> int:
        """How many cached positions are still valid: the strategy may have truncated the branch."""
        if self.branch.evaluated >= self.seen:
            return self.done
        return min(self.done, self.position(self.branch.evaluated))

    def next_tokens(self, rows: int) -> list[int]:
        """The token ids at the next `rows` positions."""
        if not self.resume:
            return self.tokens(self.done, self.done + rows)
        first = self.done - (self.start - self.sinks)
        return self.branch.tokens[first : first + rows]

    def advance(self, rows: int) -> None:
        """Marks the next `rows` positions as evaluated."""
        self.done += rows
        if self.resume and self.done == self.start:
            self.done, self.resume = self.resume, 0

    def begin_anew(self, context_length: int) -> None:
        """Restarts the text: keeps the first SINKS tokens and as many of the newest as fill half the context."""
        self.dropped = len(self.branch.tokens) - max(context_length // 2, SINKS + 1)
        if self.whole:  # what is left is a prompt of its own
            self.whole = len(self.branch.tokens) - self.dropped

    def take(self, logits: Floats, hidden: Floats, complete: bool) -> None:
        """Takes rows of a step's output, which the next step overwrites.

        If the strategy is not advanced before that, copies them, the logits only as far as they are wanted.
        """
        if complete:
            self.parts.append((logits, hidden))
            return
        wanted = self.done - (self.goal - self.branch.wanted)
        self.parts.append((logits[max(0, len(logits) - wanted) :].copy(), hidden.copy()))

    def complete(self) -> Rows:
        """The rows for the strategy, once all positions are evaluated."""
        self.seen = self.branch.evaluated = len(self.branch.tokens)
        parts, self.parts = self.parts, []
        chosen, self.chosen = self.chosen, None
        if len(parts) == 1:
            return Rows(*parts[0], chosen, self.early)
        logits, hidden = zip(*parts, strict=True)
        return Rows(np.concatenate(logits), np.concatenate(hidden))
