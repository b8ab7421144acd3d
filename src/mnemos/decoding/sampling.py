"""Greedy decoding and sampling: token by token, for one or several results, with or without drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mnemos.contract import Floats
from mnemos.decoding.choice import Chooser, Constraint, DeadEnd, log_sum_exp, top_tokens
from mnemos.decoding.history import History
from mnemos.decoding.seeds import stream_seed
from mnemos.decoding.stopping import End, StopWatch
from mnemos.decoding.strategy import Advance, Branch, Emitted, FinishedSequence, Rows


class Drafter(Protocol):
    """Guesses how a text continues."""

    def draft(self, history: History, limit: int) -> list[int] | int:
        """At most `limit` guessed tokens, or the number that the engine's draft model should guess."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Is told how many of the last draft's tokens turned out right."""


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
    logprob_sum: float = 0.0
    end: End | None = None

    @property
    def drafts(self) -> list[int]:
        """The guesses, the strategy's or the engine's draft model's, after the chosen tokens."""
        return self.branch.tokens[len(self.history.tokens) :]

    def finished(self, sequence: int, emitted: list[Emitted]) -> FinishedSequence:
        """The text as a result; only for a text that has ended."""
        assert self.end is not None
        return self.watch.finished(self.end, self.history, sequence, emitted)


class Sampling:
    """The strategy for greedy decoding and sampling.

    results     how many texts are returned; they share the prompt's pages
    samples     how many are generated (best_of); if more, the best by mean log probability are returned at the end
    logprobs    the number of most probable tokens to report, None for no log probabilities
    most        the maximum length of a text in tokens, which drafts do not exceed
    early_layers  layers whose logits the chooser's processors need
    drafter     makes the guesser for one text, None without speculation. A draft is accepted where it equals the token
                that is chosen anyway: random numbers depend on the position alone, so drafts never change the text.
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
        early_layers: tuple[int, ...] = (),
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
        self._early_layers = early_layers
        self._texts: list[_Text] = []
        self._live: list[_Text] = []

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        branch = Branch(prompt)
        branch.early_layers = self._early_layers
        self._texts = [self._text(branch, number) for number in range(self._samples)]
        self._live = list(self._texts)
        if self._samples == 1:
            self._set_draw(self._texts[0])
        return [branch]

    def _set_draw(self, text: _Text) -> None:
        text.branch.draw = None if text.constraint is not None else self._chooser.draw(text.seed)
        text.branch.logits = self._logprobs is not None

    def _text(self, branch: Branch, number: int) -> _Text:
        seed = stream_seed(self._seed, number)
        history = History(branch.tokens, seed=seed)
        constraint = None if self._constraint is None else self._constraint.fork()
        drafter = None if self._drafter is None else self._drafter()
        return _Text(number, branch, history, seed, self._watch(), constraint, drafter)

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        live = self._live
        if self._samples == 1 and self._drafter is None:
            return self._advance_alone(live[0], rows[live[0].branch])
        given = [rows[text.branch] for text in live]
        if len(live) > 1 and live[1].branch is live[0].branch:  # at the first step, all share the prompt's branch
            for text in live[1:]:
                text.branch = text.branch.fork()
            for text in live:
                self._set_draw(text)
        advance = Advance([])
        for text, own in zip(live, given, strict=True):
            known = len(text.emitted)
            drafts = text.drafts
            accepted = self._extend(text, own, drafts)
            advance.drafted += len(drafts)
            advance.accepted += accepted
            if text.end is None:
                self._grow_branch(text, drafts)
                advance.branches.append(text.branch)
            if self._samples == self._results:
                advance.emitted += text.emitted[known:]
                if text.end is not None:
                    advance.finished.append(text.finished(text.sequence, []))
        if len(advance.branches) < len(live):
            self._live = [text for text in live if text.end is None]
            if not self._live and self._samples > self._results:
                advance.finished = self._best()
        return advance

    def _advance_alone(self, text: _Text, rows: Rows) -> Advance:
        """Like `advance`, for one text without drafts: the case of most steps."""
        token = self._choose(text, rows, len(rows.logits) - 1)
        if token is None or text.end is not None:
            emitted = [] if token is None else text.emitted[-1:]
            return Advance([], emitted, [text.finished(text.sequence, [])])
        text.branch.tokens.append(token)
        return Advance([text.branch], text.emitted[-1:])

    def _extend(self, text: _Text, rows: Rows, drafts: list[int]) -> int:
        """Chooses tokens until one differs from its draft, or the text ends. Returns how many drafts were right."""
        accepted = 0
        first = len(rows.logits) - len(drafts) - 1
        while True:
            token = self._choose(text, rows, first + accepted)
            if token is None or accepted == len(drafts) or token != drafts[accepted]:
                break
            accepted += 1
            if text.end is not None:
                break
        if drafts and text.drafter is not None:
            text.drafter.learn(len(drafts), accepted)
        return accepted

    def _choose(self, text: _Text, rows: Rows, place: int) -> int | None:
        """Chooses the next token; None if no token may follow, which ends the text."""
        history = text.history
        if rows.tokens is not None:
            token = rows.tokens[place]
        else:
            if rows.early is not None:
                history.early = rows.early[:, place]
            try:
                token = self._chooser.choose(history, rows.logits[place], text.seed, text.constraint)
            except DeadEnd as error:
                if not history.generated:
                    raise
                text.end = End("error", error=str(error))
                return None
        history.tokens.append(token)
        piece, text.end = text.watch.push(token, history.tokens)
        if text.constraint is not None and text.end is None:
            text.end = accept(text.constraint, token)
        if self._logprobs is None:
            text.emitted.append(Emitted(token, None, (), text.sequence, piece))
        else:
            text.emitted.append(self._emitted(text, rows.logits[place], token, self._logprobs, piece))
        return token

    def _emitted(self, text: _Text, row: Floats, token: int, count: int, piece: str | None) -> Emitted:
        emitted = with_logprobs(row, token, count, text.sequence, piece)
        text.logprob_sum += emitted.logprob or 0.0
        return emitted

    def _grow_branch(self, text: _Text, drafts: list[int]) -> None:
        branch, tokens = text.branch, text.history.tokens
        if drafts:
            branch.truncate(len(tokens) - 1)
        branch.tokens.append(tokens[-1])
        if text.drafter is None:
            return
        room = self._most - text.history.generated - 1
        drafted = text.drafter.draft(text.history, room) if room > 0 else []
        if isinstance(drafted, int):
            branch.wanted, branch.drafts = 1, drafted
        else:
            branch.tokens += drafted
            branch.wanted, branch.drafts = 1 + len(drafted), 0

    def _best(self) -> list[FinishedSequence]:
        best = sorted(self._texts, key=lambda text: -text.logprob_sum / text.history.generated)[: self._results]
        return [
            text.finished(place, [Emitted(e.token_id, e.logprob, e.top_logprobs, place, e.text) for e in text.emitted])
            for place, text in enumerate(best)
        ]


def accept(constraint: Constraint, token: int) -> End | None:
    """Advances the constraint by a token, which is the end of the text if nothing more may follow."""
    try:
        constraint.accept(token)
    except DeadEnd as error:
        return End("error", error=str(error))
    return End("stop") if constraint.complete else None


def with_logprobs(row: Floats, token: int, count: int, sequence: int = 0, piece: str | None = None) -> Emitted:
    """The token with its log probability in the model's own distribution, and those of the `count` most probable."""
    total = log_sum_exp(row)
    top = tuple((other, float(row[other]) - total) for other in top_tokens(row, count))
    return Emitted(token, float(row[token]) - total, top, sequence, piece)
