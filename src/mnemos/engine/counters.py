"""What an engine counts while it runs, and the events that it reports; see `statistics` for a snapshot."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

RECENT = 2048  # how many of the latest latencies the percentiles cover


@dataclass(frozen=True)
class Event:
    """A change in a request's life; kind: submitted, refused, started, first_token, finished, cancelled or failed.

    `request` is its number, `seconds` the time since it was submitted, `tokens` the number generated so far.
    """

    kind: str
    request: int
    seconds: float
    tokens: int = 0


Listener = Callable[[Event], None]


@dataclass
class Counters:
    """Written by the engine's thread (`submitted` and `refused` by callers under the thread's lock)."""

    submitted: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    evaluated_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0  # spent in steps
    model_seconds: float = 0.0  # of these, spent in the model
    first_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    inter_token_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    drafted: int = 0
    accepted: int = 0
