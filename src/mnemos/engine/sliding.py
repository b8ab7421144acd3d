"""Where endless texts slide: they drop pages and continue without re-evaluating what they keep.

When a text with overflow="sliding" fills the context, it keeps its first tokens, the attention sinks, and its newest
half; the pages between are freed. Positions continue to grow, so the kept keys and values stay as they are. Only the
sinks are evaluated again, at the positions right before the kept ones: they depend on nothing but themselves, and their
distance to the text stays within the context. Kept keys and values were computed with the dropped text in view and
still carry some of it, as in StreamingLLM (Xiao et al. 2023, arXiv:2309.17453).

When a text slides depends on positions alone, never on the steps in which it is evaluated: a preempted text slides
at the same positions again when it is recomputed, and so does one whose drafts are verified.

Positions grow up to a limit; for models with a table of learned positions, that is the context length. There a text
restarts: the sinks and the newest half are evaluated again, from position 0 on.
"""

from __future__ import annotations

from dataclasses import dataclass

SINKS = 4  # the minimum number of first tokens that an endless text always keeps


@dataclass(frozen=True)
class Sliding:
    """The slides of a text, numbered from 1: before slide n, it sees positions from `start(n - 1)` on, and its sinks.

    context: the most positions that a row sees; limit: the largest number of positions; page_size: positions per page.
    """

    context: int
    limit: int
    page_size: int

    @staticmethod
    def of(context: int, position_limit: int, page_size: int) -> Sliding:
        """`position_limit` is the model's, 0 if positions may not grow beyond the context."""
        sliding = Sliding(context, max(position_limit, context), page_size)
        room = sliding.step >= 2 * sliding.sinks  # else pages are too large for sliding
        return sliding if room else Sliding(context, context, page_size)

    @property
    def sinks(self) -> int:
        """How many first tokens are evaluated again at a slide, in whole pages."""
        return -(-SINKS // self.page_size) * self.page_size

    @property
    def step(self) -> int:
        """How many positions a slide drops: half the context, in whole pages."""
        return self.context // 2 // self.page_size * self.page_size

    def count(self, position: int) -> int:
        """How many slides there are before the row at `position`."""
        return 0 if position < self.context else (position - self.context + self.sinks) // self.step + 1

    def begin(self, slide: int) -> int:
        """The first position whose row does not see what slide number `slide` drops."""
        return self.context if slide == 1 else self.context - self.sinks + (slide - 1) * self.step

    def start(self, slides: int) -> int:
        """The first position that a text keeps after `slides` slides."""
        return slides * self.step
