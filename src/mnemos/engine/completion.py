"""A request's output: streamed tokens and the finished completion."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isnan
from typing import TYPE_CHECKING, NamedTuple

from mnemos.engine.request import Timings

if TYPE_CHECKING:
    from mnemos.decoding.prompt_scores import ScoredToken
    from mnemos.memory.response_cache import Cached


class StreamedToken(NamedTuple):  # a dataclass would take microseconds to make, for each token
    """A token once it is final.

    text           the text to show now: whole characters, possibly none, never a part of a stop string
    token_id       None where only held-back text is released at the end
    sequence       the number of the request's result that it belongs to
    finish_reason  at a result's last token (stop, length, repetition, time or error), else None
    text_offset    how many characters of the result's text come before `text`
    stopped_by     at a result's last token, the stop string or stop token id that ended it, else None
    error          with finish_reason "error", why no token could follow, else None
    ends_only      True for an end-of-text or stop token, which ends a result and is no part of its text
    """

    text: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    sequence: int = 0
    finish_reason: str | None = None
    text_offset: int = 0
    stopped_by: str | int | None = None
    error: str | None = None
    ends_only: bool = False


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens: in the prompt, of those found in the prefix cache, and generated (by all results)."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Choice:
    """One result. `logprobs` has a value for each token if requested, else it is empty, and so do `top_logprobs` and,
    with a tokenizer, `text_offsets`: the number of characters of the text before each token.

    finish_reason is stop, length, repetition, time, error or, for the partial result of a cancelled request, cancelled.
    error: of a text that ended with error, why no token could follow; None for others.
    token_ids are all generated tokens, including the end-of-text or stop token; the text leaves that out unless the
    config has include_stop_str_in_output.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    score: float | None = None
    stopped_by: str | int | None = None
    error: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Completion:
    """A request's results; its own properties are those of the best or first one.

    prompt_logprobs: the score of each prompt token, with logprob None for the first; empty unless asked for.
    cached: why nothing was generated, for an answer from a ResponseCache; else None.
    """

    choices: list[Choice]
    prompt_ids: list[int]
    usage: Usage
    timings: Timings
    prompt_logprobs: list[ScoredToken] = field(default_factory=list)
    cached: Cached | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def score(self) -> float | None:
        return self.choices[0].score

    def to_json(self) -> str:
        """The completion as one line of JSON; times in seconds."""
        import json

        timings = {
            "queued": self.timings.queued,
            "time_to_first_token": self.timings.time_to_first_token,
            "total": self.timings.total,
        }
        content = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "choices": [asdict(choice) for choice in self.choices],
            "prompt_ids": self.prompt_ids,
            "prompt_logprobs": [token._asdict() for token in self.prompt_logprobs],
            "usage": {**asdict(self.usage), "total_tokens": self.usage.total_tokens},
            "timings": {name: None if isnan(seconds) else seconds for name, seconds in timings.items()},
        }
        return json.dumps(content, ensure_ascii=False)
