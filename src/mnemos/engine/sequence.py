"""What the engine keeps of a request: its branches, the pages that hold them, and where its results go."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Protocol

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.strategy import Branch, Emitted, FinishedSequence, Rows, Strategy

SINKS = 4  # first tokens that endless generation always keeps; Xiao et al. 2023, arXiv:2309.17453
_numbers = count()


class Sink(Protocol):
    """Takes what a request brings forth; called from the engine's thread only."""

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None: ...

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes."""


class Sequence:
    """A branch in the cache. Lengths count cached positions: tokens, less those that endless generation has dropped.

    pages    its page table; behind the model's window NO_PAGE
    done     positions that the cache holds
    goal     positions that it shall hold before the strategy is asked again
    first    the first position whose row the strategy is to be given
    dropped  tokens that were cut out behind the first SINKS ones
    seen     the branch's length when it was last complete; if the branch's own count is lower, it was truncated
    leader   a sibling to share the first positions with, as soon as it has evaluated so many
    chosen   the tokens that the branch's draw chose of this step's rows
    """

    __slots__ = ("branch", "chosen", "done", "dropped", "first", "goal", "leader", "pages", "parts", "seen")

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.pages = array("i")  # int32, and quickly copied into a step's batch
        self.done = 0
        self.goal = len(branch.tokens)
        self.first = 0
        self.dropped = 0
        self.seen = 0
        self.leader: tuple[Sequence, int] | None = None
        self.parts: list[tuple[Floats, Floats]] = []
        self.chosen: list[int] | None = None

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
        """How many cached positions still belong to the branch's tokens, which its strategy may have truncated."""
        if self.branch.evaluated >= self.seen:
            return self.done
        return min(self.done, self.position(self.branch.evaluated))

    def slide(self, context_length: int) -> None:
        """Drops tokens: keeps the first SINKS and as many of the newest as fill half the context."""
        self.dropped = len(self.branch.tokens) - max(context_length // 2, SINKS + 1)

    def keep(self, logits: Floats, hidden: Floats) -> None:
        """Keeps rows of a step's output until the others are there: a copy, of the logits as far as they are wanted."""
        wanted = self.done - (self.goal - self.branch.wanted)
        self.parts.append((logits[max(0, len(logits) - wanted) :].copy(), hidden.copy()))

    def complete(self) -> Rows:
        """All positions are evaluated: the rows for the strategy."""
        self.seen = self.branch.evaluated = len(self.branch.tokens)
        parts, self.parts = self.parts, []
        chosen, self.chosen = self.chosen, None
        if len(parts) == 1:
            return Rows(*parts[0], chosen)
        logits, hidden = zip(*parts, strict=True)
        return Rows(np.concatenate(logits), np.concatenate(hidden))


@dataclass
class Timings:
    """Seconds on the engine's clock (time.perf_counter); nan until the event has happened."""

    submitted: float
    started: float = float("nan")
    finished: float = float("nan")
    tokens: list[float] = field(default_factory=list)  # when each streamed token became certain

    @property
    def queued(self) -> float:
        return self.started - self.submitted

    @property
    def time_to_first_token(self) -> float:
        return self.tokens[0] - self.submitted if self.tokens else float("nan")

    @property
    def inter_token_latencies(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def total(self) -> float:
        return self.finished - self.submitted


class State(Enum):
    WAITING = "waiting"  # new or preempted
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Request:
    """One strategy at work. `deadline` is a time on the engine's clock by which the request must have started."""

    strategy: Strategy
    prompt: list[int]
    sink: Sink
    timings: Timings
    priority: int = 0
    tenant: str = "default"
    salt: str | None = None
    deadline: float | None = None
    sliding: bool = False
    source: list[int] | None = None  # what the user gave, where the model reads that apart from what it continues
    condition: object = None  # what the model made of `source`
    number: int = field(default_factory=lambda: next(_numbers))
    sequences: list[Sequence] = field(default_factory=list)
    rank: tuple[int, int] = (0, 0)  # priority and order of admission: the last is preempted first
    state: State = State.WAITING
    started: bool = False
    prefilling: bool = True
    pending: int = 0  # positions to evaluate before the strategy is asked
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    preemptions: int = 0
