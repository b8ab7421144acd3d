"""A request: a strategy, its sequences, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Protocol

from mnemos.decoding.strategy import Branch, Emitted, FinishedSequence, Rows, Strategy
from mnemos.engine.sequence import Sequence

if TYPE_CHECKING:
    from mnemos.decoding.prompt_scores import ScoredToken

NO_ADAPTER = -1  # of a request that uses the model as it is
_numbers = count()


class Sink(Protocol):
    """Receives a request's results; called from the engine's thread only."""

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None: ...

    def ring(self) -> None:
        """Called after a step's deliveries, its own and those to other requests."""

    def end(self, error: BaseException | None) -> None:
        """Called last, with the request's error or None."""


@dataclass
class Timings:
    """Seconds on the engine's clock (time.perf_counter); nan until the event has happened."""

    submitted: float
    started: float = float("nan")
    finished: float = float("nan")
    tokens: list[float] = field(default_factory=list)  # when each streamed token became final

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
    """The stages of a request's life."""

    WAITING = "waiting"  # new or preempted
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Request:
    """A strategy and its state in the engine. `deadline`: when, on the engine's clock, it must have started.

    memory: what rows see of long texts, as in `Batch.memories`; None: as the engine's do.
    adapter: a number in `ModelSpec.adapters`, or NO_ADAPTER.
    skip_special: whether texts leave out the names of special tokens.
    prompt_scores: the strategy's scores of the prompt's tokens, where it was asked for them, as far as it has come.
    """

    strategy: Strategy
    prompt: list[int]
    sink: Sink
    timings: Timings
    priority: int = 0
    tenant: str = "default"
    salt: str | None = None
    adapter: int = NO_ADAPTER
    memory: tuple[int, int, int] | None = None
    deadline: float | None = None
    sliding: bool = False
    source: list[int] | None = None  # the encoder's input, for a model that has an encoder
    skip_special: bool = True
    prompt_scores: list[ScoredToken] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))
    sequences: list[Sequence] = field(default_factory=list)
    rank: tuple[int, int] = (0, 0)  # priority and order of admission: the last is preempted first
    state: State = State.WAITING
    started: bool = False
    prefilling: bool = True
    pending: int = 0  # positions to evaluate before the strategy is advanced
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0

    def rows(self) -> dict[Branch, Rows]:
        """The rows for the strategy, once all positions are evaluated."""
        return {sequence.branch: sequence.complete() for sequence in self.sequences}
