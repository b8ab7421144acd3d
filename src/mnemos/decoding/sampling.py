"""Greedy decoding and sampling: one token after the other, for one or several results, with or without drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mnemos.decoding.history import History
from mnemos.decoding.processors import Processor
from mnemos.decoding.sampler import Cutoffs, greedy, log_sum_exp, sample, stream_seed, top_tokens, uniform
from mnemos.decoding.stopping import End, StopWatch
from mnemos.decoding.strategy import Advance, Branch, Emitted, FinishedSequence, Rows

Floats = npt.NDArray[np.float32]


class Constraint(Protocol):
    """A grammar's state along one text."""

    def forbid(self, logits: Floats) -> None:
        """Sets the logits of the tokens that may not come next to minus infinity."""

    def accept(self, token: int) -> None: ...

    def fork(self) -> Constraint: ...

    @property
    def complete(self) -> bool:
        """True if nothing more may follow."""


class Drafter(Protocol):
    """Guesses how a text goes on."""

    def draft(self, history: History, limit: int) -> list[int]:
        """At most `limit` tokens, none if there is no good guess."""

    def ask(self, limit: int) -> int:
        """How many tokens the engine's draft model shall guess instead."""

    def learn(self, drafted: int, accepted: int) -> None:
        """How many of the last draft's tokens turned out right."""


@dataclass(frozen=True)
class Chooser:
    """How a row of logits becomes a token. Without `cutoffs` it is the most probable one.

    `filters` are the cut-offs that the sampler does not know by itself, temperature then included.
    """

    processors: Sequence[Processor] = ()
    filters: Sequence[Processor] = ()
    cutoffs: Cutoffs | None = None

    def choose(self, history: History, logits: Floats, seed: int, constraint: Constraint | None = None) -> int:
        if self.processors or self.filters or constraint is not None:
            logits = logits.copy()
        for processor in self.processors:
            processor(history, logits)
        if constraint is not None:
            constraint.forbid(logits)
        for filter_ in self.filters:
            filter_(history, logits)
        if self.cutoffs is None:
            return greedy(logits)
        return sample(logits, self.cutoffs, uniform(seed, len(history.tokens)))


@dataclass(eq=False)
class _Text:
    """One result under construction."""

    sequence: int
    branch: Branch
    history: History
    seed: int
    watch: StopWatch
    constraint: Constraint | None
    drafter: Drafter | None
    emitted: list[Emitted] = field(default_factory=list)
    streamed: int = 0
    logprob_sum: float = 0.0
    end: End | None = None

    @property
    def drafts(self) -> list[int]:
        """What was guessed, by the strategy or the engine's draft model, behind the chosen tokens."""
        return self.branch.tokens[len(self.history.tokens) :]

    def take_new(self) -> list[Emitted]:
        """The tokens that came since the last call."""
        new, self.streamed = self.emitted[self.streamed :], len(self.emitted)
        return new

    def finished(self, sequence: int, emitted: list[Emitted]) -> FinishedSequence:
        assert self.end is not None
        self.watch.finish()
        tokens = self.history.tokens[self.history.prompt_length :]
        text_tokens = None if self.end.is_text else len(tokens) - 1
        return FinishedSequence(
            tokens,
            self.end.reason,
            emitted,
            sequence=sequence,
            text_tokens=text_tokens,
            text=self.watch.text,
            stopped_by=self.end.stopped_by,
        )


class Sampling:
    """The strategy of greedy decoding and of sampling.

    results     how many texts are returned; they share the prompt's pages
    samples     how many are made (best_of); where that is more, the best by mean log probability come at the end
    logprobs    the number of most probable tokens to report, None for no log probabilities
    most        the most tokens that a text will have, so that drafts do not go beyond
    drafter     makes the guesser of one text, None without speculation. A draft is accepted where it is the token that
                is chosen anyway: random numbers depend on the position alone, so the text does not depend on drafts.
    """

    needs_all_prompt_rows = False

    def __init__(
        self,
        chooser: Chooser,
        watch: Callable[[], StopWatch],
        *,
        seed: int,
        most: int,
        results: int = 1,
        samples: int = 1,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        self.max_branches = samples
        self._chooser = chooser
        self._watch = watch
        self._seed = seed
        self._most = most
        self._results = results
        self._samples = samples
        self._logprobs = 0 if logprobs is None and samples > results else logprobs
        self._constraint = constraint
        self._drafter = drafter
        self._texts: list[_Text] = []
        self._live: list[_Text] = []

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        branch = Branch(prompt)
        self._texts = [self._text(branch, number) for number in range(self._samples)]
        self._live = list(self._texts)
        return [branch]

    def _text(self, branch: Branch, number: int) -> _Text:
        history, seed = History(branch.tokens), stream_seed(self._seed, number)
        constraint = None if self._constraint is None else self._constraint.fork()
        drafter = None if self._drafter is None else self._drafter()
        return _Text(number, branch, history, seed, self._watch(), constraint, drafter)

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        given = {text: rows[text.branch] for text in self._live}
        for text in self._live[1:]:
            if text.branch is self._live[0].branch:  # at the first step, all grow from the prompt's branch
                text.branch = text.branch.fork()
        drafted = sum(len(text.drafts) for text in self._live)
        accepted = sum(self._extend(text, given[text]) for text in self._live)
        ended = [text for text in self._live if text.end is not None]
        emitted = [token for text in self._live for token in text.take_new()]
        self._live = [text for text in self._live if text.end is None]
        branches = [text.branch for text in self._live]
        if self._samples > self._results:
            return Advance(branches, [], [] if self._live else self._best(), drafted, accepted)
        finished = [text.finished(text.sequence, []) for text in ended]
        return Advance(branches, emitted, finished, drafted, accepted)

    def _extend(self, text: _Text, rows: Rows) -> int:
        """Chooses tokens until one differs from its draft, or the text ends. Returns how many drafts were right."""
        drafts, accepted = text.drafts, 0
        for row in rows.logits[-len(drafts) - 1 :]:
            token = self._choose(text, row)
            if accepted == len(drafts) or token != drafts[accepted]:
                break
            accepted += 1
            if text.end is not None:
                break
        if drafts and text.drafter is not None:
            text.drafter.learn(len(drafts), accepted)
        if text.end is None:
            self._grow_branch(text)
        return accepted

    def _choose(self, text: _Text, row: Floats) -> int:
        token = self._chooser.choose(text.history, row, text.seed, text.constraint)
        text.history.append(token)
        piece, text.end = text.watch.push(token, text.history.tokens)
        if text.constraint is not None and text.end is None:
            text.constraint.accept(token)
            if text.constraint.complete:
                text.end = End("stop")
        text.emitted.append(self._emitted(text, row, token, piece))
        return token

    def _emitted(self, text: _Text, row: Floats, token: int, piece: str | None) -> Emitted:
        if self._logprobs is None:
            return Emitted(token, sequence=text.sequence, text=piece)
        emitted = with_logprobs(row, token, self._logprobs, text.sequence, piece)
        text.logprob_sum += emitted.logprob or 0.0
        return emitted

    def _grow_branch(self, text: _Text) -> None:
        tokens = text.history.tokens
        text.branch.truncate(len(tokens) - 1)
        text.branch.tokens.append(tokens[-1])
        room = self._most - text.history.generated - 1
        drafts, asked = [], 0
        if text.drafter is not None and room > 0:
            drafts, asked = text.drafter.draft(text.history, room), text.drafter.ask(room)
        text.branch.tokens += drafts
        text.branch.wanted, text.branch.drafts = 1 + len(drafts), asked

    def _best(self) -> list[FinishedSequence]:
        best = sorted(self._texts, key=lambda text: -text.logprob_sum / text.history.generated)[: self._results]
        return [
            text.finished(place, [Emitted(e.token_id, e.logprob, e.top_logprobs, place, e.text) for e in text.emitted])
            for place, text in enumerate(best)
        ]


def with_logprobs(row: Floats, token: int, count: int, sequence: int = 0, piece: str | None = None) -> Emitted:
    """The token with its log probability in the model's own distribution, and those of the `count` most probable."""
    total = log_sum_exp(row)
    top = tuple((other, float(row[other]) - total) for other in top_tokens(row, count))
    return Emitted(token, float(row[token]) - total, top, sequence, piece)
