"""Where endless texts slide: they leave pages behind and go on without evaluating again what they keep.

A text with overflow="sliding" that fills the context keeps its first tokens, the attention sinks, and its newest half;
the pages between are given back. Positions go on growing, so the kept keys and values stay as they are. The sinks
alone are evaluated again, at the positions right before the kept ones: they depend on nothing but themselves, and
their distance to the text stays within the context. Kept keys and values were computed with the dropped text in sight
and still carry some of it, as in StreamingLLM (Xiao et al. 2023, arXiv:2309.17453).

When a text slides depends on positions alone, never on the steps in which it is evaluated: one that is preempted slides
at the same places again when it is recomputed, and so does one whose drafts are verified.

Positions grow up to a limit, which models with a table of learned positions reach with the context. There a text begins
anew: the sinks and the newest half are evaluated again, from position 0 on.
"""

from __future__ import annotations

from dataclasses import dataclass

SINKS = 4  # first tokens that an endless text always keeps, at least


@dataclass(frozen=True)
class Sliding:
    """The slides of a text, numbered from 1: before slide n, it sees what follows page `start(n - 1)`, and its sinks.

    context, limit: the most positions that a row sees, and that there are; page_size: positions of a page.
    """

    context: int
    limit: int
    page_size: int

    @staticmethod
    def of(context: int, position_limit: int, page_size: int) -> Sliding:
        """`position_limit` is the model's, 0 where positions may not grow beyond the context."""
        sliding = Sliding(context, max(position_limit, context), page_size)
        room = sliding.step >= 2 * sliding.sinks  # else pages are too large to slide by them
        return sliding if room else Sliding(context, context, page_size)

    @property
    def sinks(self) -> int:
        """How many first tokens are evaluated again at a slide: whole pages."""
        return -(-SINKS // self.page_size) * self.page_size

    @property
    def step(self) -> int:
        """How many positions a slide leaves behind: half the context, in whole pages."""
        return self.context // 2 // self.page_size * self.page_size

    def count(self, position: int) -> int:
        """How many slides there are before the row at `position`."""
        return 0 if position < self.context else (position - self.context + self.sinks) // self.step + 1

    def begin(self, slide: int) -> int:
        """The first position whose row does not see what slide number `slide` leaves behind."""
        return self.context if slide == 1 else self.context - self.sinks + (slide - 1) * self.step

    def start(self, slides: int) -> int:
        """The first position that a text keeps after so many slides."""
        return slides * self.step
