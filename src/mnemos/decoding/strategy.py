"""The contract between a decoding strategy and the engine.

A strategy drives one request through branches. A branch is a token sequence whose keys and values the engine keeps
in pages; forked branches share them. At each step, the engine evaluates the tokens of all branches that have not been
evaluated yet, as rows of one ragged batch together with all other requests, and hands every strategy the rows it wants.
A strategy never calls the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mnemos.contract import Floats

if TYPE_CHECKING:
    from mnemos.decoding.choice import Draw


class Branch:
    """A token sequence under construction: the prompt and the tokens generated so far.

    tokens     all token ids; append to ask for the evaluation of more
    evaluated  how many of them are in the cache; only the engine raises it, `truncate` lowers it
    wanted     how many of the newest rows the strategy receives (1, or drafts + 1 when verifying)
    drafts     how many tokens the engine's draft model may guess after the last one; it appends its guesses to
               `tokens` and raises `wanted` by their number
    draw       set where the choice depends on the row, a seed and the token's position alone: the engine then chooses
               the tokens of all such branches together and hands them over in `Rows.tokens`
    logits     whether the strategy reads logits although it has a draw; if not, `Rows.logits` may have no columns
    early_layers  layers of whose input the strategy gets logits too, in `Rows.early`; forks have the same
    parent     the branch that this one was forked from, until the engine has shared its pages
    """

    __slots__ = ("drafts", "draw", "early_layers", "evaluated", "logits", "parent", "tokens", "wanted")

    def __init__(self, tokens: Sequence[int], parent: Branch | None = None) -> None:
        self.tokens = list(tokens)
        self.evaluated: int = parent.evaluated if parent else 0
        self.wanted = 1
        self.drafts = 0
        self.draw: Draw | None = None
        self.logits = True
        self.early_layers: tuple[int, ...] = parent.early_layers if parent else ()
        self.parent = parent

    def fork(self) -> Branch:
        """A branch with the same tokens that shares this one's cache pages."""
        return Branch(self.tokens, parent=self)

    def truncate(self, length: int) -> None:
        """Drops all tokens after the first `length`, evaluated or not."""
        del self.tokens[length:]
        self.evaluated = min(self.evaluated, length)


class Rows(NamedTuple):
    """The model's output for a branch's newest `wanted` tokens: float32 views, to be copied if kept.

    logits (wanted, vocabulary); hidden (wanted, hidden size): the last hidden states. At the first step of a strategy
    with `needs_all_prompt_rows`, hidden has a row for every prompt token, in order; logits may hold the last row only.
    tokens: the choice of the branch's `draw` for each row of logits; None where the strategy has to choose.
    early (layers, wanted, vocabulary): the logits of the branch's `early_layers`; None if it has none.
    """

    logits: Floats
    hidden: Floats
    tokens: list[int] | None = None
    early: Floats | None = None


class Emitted(NamedTuple):
    """A token that is final and can be streamed.

    token_id, sequence   the token, and the number of the result it continues (0 unless n > 1)
    logprob              log probability under the model's own distribution, before any processor; None unless asked for
    top_logprobs         the most probable (token id, log probability) pairs, as many as asked for
    text                 None: the text is the tokenizer's for the token. A string: stream exactly this instead; the
                         strategy sets it where stop strings hold text back ("" for now) or a stop token has no text
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
    score          beam search's score, else None
    sequence       its number among the request's results
    text_tokens    the number of leading tokens that form its text (None: all), without a token that only ended it
    text           its whole text if stop strings were given (it ends before the one that matched), else None:
                   decode tokens[:text_tokens]. A stream's last piece is the part not streamed yet
    stopped_by     the stop string or stop token id that ended it, else None
    error          with finish_reason "error", why no token could follow, else None
    """

    tokens: list[int]
    finish_reason: str
    emitted: list[Emitted] = field(default_factory=list)
    score: float | None = None
    sequence: int = 0
    text_tokens: int | None = None
    text: str | None = None
    stopped_by: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class Advance:
    """A strategy's answer to a step: the branches to continue (none: the request is done) and the new final tokens.

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
    max_branches: int  # the most branches it will ever have at once, for planning pages

    def start(self, prompt: Sequence[int]) -> list[Branch]: ...

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        """Called when every branch returned last has been evaluated completely."""
        ...
