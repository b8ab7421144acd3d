"""The contract between a decoding strategy and the engine.

A strategy drives one request through branches. A branch is a token sequence whose keys and values the engine keeps
in pages; forked branches share them. At each step the engine evaluates the tokens that the branches have not evaluated
yet, as rows of one ragged batch together with all other requests, and hands every strategy the rows that it wants. A
strategy never calls the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mnemos.contract import Floats

if TYPE_CHECKING:
    from mnemos.decoding.choice import Draw


class Branch:
    """A token sequence under construction: the prompt and what was generated so far.

    tokens     all token ids; append to ask for the evaluation of more
    evaluated  how many of them are in the cache; only the engine raises it, `truncate` lowers it
    wanted     how many of the newest rows' logits the strategy is to be given (1, or drafts + 1 when verifying)
    drafts     how many tokens the engine's draft model may guess after the last one; it appends its guesses to
               `tokens` and raises `wanted` by their number
    draw       set where a row, a seed and the token's place decide alone: the engine then chooses the tokens of all
               such branches together and hands them over in `Rows.tokens`
    logits     whether the strategy reads logits although it has a draw; if not, `Rows.logits` may have no columns
    parent     the branch that this one was forked from, until the engine has shared its pages
    """

    __slots__ = ("drafts", "draw", "evaluated", "logits", "parent", "tokens", "wanted")

    def __init__(self, tokens: Sequence[int], parent: Branch | None = None) -> None:
        self.tokens = list(tokens)
        self.evaluated: int = parent.evaluated if parent else 0
        self.wanted = 1
        self.drafts = 0
        self.draw: Draw | None = None
        self.logits = True
        self.parent = parent

    def fork(self) -> Branch:
        """A branch with the same tokens that shares this one's cache pages."""
        return Branch(self.tokens, parent=self)

    def truncate(self, length: int) -> None:
        """Forgets all tokens after `length`, evaluated or not."""
        del self.tokens[length:]
        self.evaluated = min(self.evaluated, length)


class Rows(NamedTuple):
    """What the model said about a branch's newest `wanted` tokens: float32 views, to be copied if kept.

    logits (wanted, vocabulary); hidden (wanted, hidden size): the last hidden states. At the first step of a strategy
    with `needs_all_prompt_rows`, hidden has a row for every prompt token, in order; logits may hold the last row only.
    tokens: what the branch's `draw` chose of each row of the logits; None where the strategy has to choose.
    """

    logits: Floats
    hidden: Floats
    tokens: list[int] | None = None


class Emitted(NamedTuple):
    """A token that is certain to be part of the result, ready to be streamed.

    token_id, sequence   the token, and which of the request's results it continues (0 unless n > 1)
    logprob              log probability under the model's own distribution, before any processor; None unless asked for
    top_logprobs         the most probable (token id, log probability) pairs, as many as asked for
    text                 None: the text is what the tokenizer makes of the token. A string: stream exactly this instead;
                         the strategy sets it where stop strings hold text back ("" for now) or a stop token has no text
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    sequence: int = 0
    text: str | None = None


@dataclass(frozen=True)
class FinishedSequence:
    """One finished result.

    tokens         all generated tokens, the end-of-text or stop token included
    finish_reason  stop, length, repetition, time or error
    emitted        the tokens that were not streamed step by step (beams, best_of): all of them, or none
    score          of beam search, else None
    sequence       its number among the request's results
    text_tokens    how many leading tokens make up its text (None: all); a token that only ended it does not count
    text           its whole text where stop strings were given (it ends before the one that matched), else None:
                   decode tokens[:text_tokens]. A stream's last piece is what of it was not streamed yet
    stopped_by     the stop string or stop token id that ended it, else None
    """

    tokens: list[int]
    finish_reason: str
    emitted: list[Emitted] = field(default_factory=list)
    score: float | None = None
    sequence: int = 0
    text_tokens: int | None = None
    text: str | None = None
    stopped_by: str | int | None = None


@dataclass(slots=True)
class Advance:
    """A strategy's answer to a step: the branches to go on with (none: the request is done) and what became certain.

    A branch that is not in `branches` gives its pages back. `drafted` tokens of speculation were verified in this step,
    and `accepted` of them were right.
    """

    branches: list[Branch]
    emitted: list[Emitted] = field(default_factory=list)
    finished: list[FinishedSequence] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class Strategy(Protocol):
    """One request's way of turning logits into tokens. It holds all its state; the engine calls it from one thread."""

    needs_all_prompt_rows: bool  # contrastive search keeps the hidden state of every prompt token
    max_branches: int  # the most branches it will ever have at once, so that pages can be planned for

    def start(self, prompt: Sequence[int]) -> list[Branch]: ...

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        """Called when every branch returned last has been evaluated to its end."""
        ...
