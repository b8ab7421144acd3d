"""Beam search, diverse beam search and beam sampling, with the results of Hugging Face transformers 4.

Sources: Vijayakumar et al. 2016, arXiv:1610.02424 (groups); Kool et al. 2019, arXiv:1903.06059 (sampling without
replacement by Gumbel noise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mnemos.contract import Floats
from mnemos.decoding.choice import Constraint, DeadEnd, no_choice
from mnemos.decoding.history import History
from mnemos.decoding.processors import Processor
from mnemos.decoding.ranking import largest
from mnemos.decoding.sampling import accept, with_logprobs
from mnemos.decoding.stopping import End, TextEnds
from mnemos.decoding.strategy import Advance, Branch, Emitted, FinishedSequence, Rows


@dataclass(frozen=True)
class BeamSettings:
    """`beams` in total, in `groups` groups; returns `results` texts of at most `most` tokens.

    seed         None for a deterministic search
    logprobs     the number of most probable tokens to report, None for no log probabilities
    pad_id       the token that a finished group is taken to choose when later groups are penalised for diversity
    stop_tokens  how many tokens end a text
    """

    beams: int
    results: int
    most: int
    groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    seed: int | None = None
    logprobs: int | None = None
    pad_id: int = 0
    stop_tokens: int = 1

    @property
    def group_size(self) -> int:
        return self.beams // self.groups


@dataclass(eq=False)
class _Beam:
    branch: Branch
    history: History
    score: np.float32
    constraint: Constraint | None
    emitted: tuple[Emitted, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    parent: _Beam
    token: int
    score: np.float32
    constraint: Constraint | None = None  # after the token, of a candidate that continues


@dataclass(frozen=True)
class _Hypothesis:
    score: float
    tokens: list[int]
    emitted: tuple[Emitted, ...]
    end: End
    text: str | None


@dataclass
class _Group:
    """Beams that compete with one another, and the best texts that they have finished."""

    settings: BeamSettings
    beams: list[_Beam]
    hypotheses: list[_Hypothesis] = field(default_factory=list)
    done: bool = False

    def add(self, hypothesis: _Hypothesis) -> None:
        """Keeps it if it is among the best group_size; of equal ones the first found wins."""
        self.hypotheses.append(hypothesis)
        if len(self.hypotheses) > self.settings.group_size:
            worst = min(h.score for h in self.hypotheses[:-1])
            if hypothesis.score > worst:
                self.hypotheses.pop(next(i for i, h in enumerate(self.hypotheses) if h.score == worst))
            else:
                self.hypotheses.pop()

    def is_settled(self, best: float, generated: int) -> bool:
        """True if no unfinished text, of which the best has the sum `best`, can still beat the finished ones."""
        settings = self.settings
        if len(self.hypotheses) < settings.group_size:
            return False
        if settings.early_stopping is True:
            return True
        until_end = settings.early_stopping == "never" and settings.length_penalty > 0
        length = settings.most if until_end else generated
        return min(h.score for h in self.hypotheses) >= best / float(length**settings.length_penalty)


class BeamSearch:
    """The strategy for every kind of beam search. All results are returned at the end.

    filters: the cut-offs, which count after the constraint.
    """

    needs_all_prompt_rows = False

    def __init__(
        self,
        settings: BeamSettings,
        processors: Sequence[Processor],
        ends: TextEnds,
        filters: Sequence[Processor] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.max_branches = settings.beams
        self._settings = settings
        self._processors = processors
        self._ends = ends
        self._filters = filters
        self._constraint = constraint
        self._groups: list[_Group] = []
        self._generated = 0

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        branch, seed = Branch(prompt), self._settings.seed or 0
        self._groups = [
            _Group(self._settings, [_Beam(branch, History(prompt, seed=seed), np.float32(0), self._constraint)])
            for _ in range(self._settings.groups)
        ]
        return [branch]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        self._generated += 1
        chosen: list[int] = []
        extended: list[tuple[_Group, list[_Candidate]]] = []
        for group in self._groups:
            if group.done:
                chosen += [self._settings.pad_id] * self._settings.group_size
                continue
            kept = self._select(group, rows, chosen)
            chosen += [candidate.token for candidate in kept]
            if not group.done:
                extended.append((group, kept))
        self._grow(extended, rows)
        expired = self._ends.expired
        if all(group.done for group in self._groups) or self._generated >= self._settings.most or expired:
            return Advance([], [], self._results("time" if expired else "length"))
        return Advance([beam.branch for group in self._groups if not group.done for beam in group.beams])

    def _select(self, group: _Group, rows: Mapping[Branch, Rows], chosen: list[int]) -> list[_Candidate]:
        """The candidates that continue; those that end become hypotheses if among the best group_size."""
        size = self._settings.group_size
        kept: list[_Candidate] = []
        try:
            candidates = self._candidates(group, rows, chosen)
        except DeadEnd as error:
            if self._generated == 1:
                raise
            self._end(group, End("error", error=str(error)), self._generated - 1)
            group.done = True
            return []
        for rank, candidate in enumerate(candidates):
            end, constraint = self._ending(candidate)
            if end is None:
                kept.append(replace(candidate, constraint=constraint))
            elif rank < size:
                group.add(self._hypothesis(candidate, rows[candidate.parent.branch].logits[-1], *end))
            if len(kept) == size:
                break
        # As in Hugging Face: with several groups, a text that has just ended still counts as unfinished.
        leading = candidates if self._settings.groups > 1 else kept
        group.done = not kept or group.is_settled(float(leading[0].score), self._generated)
        return kept

    def _ending(self, candidate: _Candidate) -> tuple[tuple[End, str | None] | None, Constraint | None]:
        """The end of a candidate's text and the text, or None if it continues, then with its constraint."""
        history, constraint = candidate.parent.history, candidate.parent.constraint
        history.tokens.append(candidate.token)
        end = self._ends.of(history.tokens, history.prompt_length)
        history.tokens.pop()
        if end is not None or constraint is None:
            return end, None
        constraint = constraint.fork()
        last = accept(constraint, candidate.token)
        return None if last is None else (last, None), constraint

    def _candidates(self, group: _Group, rows: Mapping[Branch, Rows], chosen: list[int]) -> list[_Candidate]:
        """The best continuations of the group's beams, best first: enough of them that group_size do not end a text."""
        count = max(2, 1 + self._settings.stop_tokens) * self._settings.group_size
        found = []
        reason = DeadEnd(
            "every token is forbidden here; loosen bad_words, logit_bias, the constraint or the processors"
        )
        for number, beam in enumerate(group.beams):
            try:
                scores = self._scores(beam, rows[beam.branch].logits[-1], chosen)
            except DeadEnd as error:
                reason = error  # nothing follows this beam
                continue
            keys = scores if self._settings.seed is None else self._noisy(scores, beam, number)
            tokens = largest(keys, min(count, len(keys)))
            found += [
                (keys[t], -number, -int(t), _Candidate(beam, int(t), scores[t])) for t in tokens if scores[t] > -np.inf
            ]
        if not found:
            raise reason
        best = [entry[3] for entry in sorted(found, key=lambda entry: entry[:3], reverse=True)[:count]]
        return best if self._settings.seed is None else sorted(best, key=lambda c: -c.score)

    def _scores(self, beam: _Beam, logits: Floats, chosen: list[int]) -> Floats:
        """The sum of log probabilities of the beam with each token, (vocabulary,) float32."""
        peak = logits.max()
        if not peak < np.inf:
            raise no_choice(logits)
        shifted = logits - peak
        shifted -= np.log(np.exp(shifted).sum())
        if chosen and self._settings.diversity_penalty:
            tokens, counts = np.unique(chosen, return_counts=True)
            shifted[tokens] -= (self._settings.diversity_penalty * counts).astype(np.float32)
        for processor in self._processors:
            processor(beam.history, shifted)
        if beam.constraint is not None:
            beam.constraint.forbid(shifted)
        for filter_ in self._filters:
            filter_(beam.history, shifted)
        return np.asarray(shifted + beam.score, dtype=np.float32)

    def _noisy(self, scores: Floats, beam: _Beam, number: int) -> Floats:
        """Scores with Gumbel noise, a function of seed and position: the largest are a sample without replacement."""
        key = np.array([self._settings.seed, len(beam.history.tokens) << 16 | number], np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).random(len(scores))
        return np.asarray(scores - np.log(-np.log(uniform + 1e-300)), dtype=np.float32)

    def _grow(self, extended: list[tuple[_Group, list[_Candidate]]], rows: Mapping[Branch, Rows]) -> None:
        """Makes the next beams. A branch takes the first of its continuations; forks of it take the others."""
        continued: set[Branch] = set()
        for group, kept in extended:
            group.beams = []
            for candidate in kept:
                parent = candidate.parent.branch
                branch = parent.fork() if parent in continued else parent
                continued.add(parent)
                group.beams.append(self._next_beam(candidate, branch, rows[parent].logits[-1]))
        for group, _ in extended:
            for beam in group.beams:  # only now that every fork exists
                beam.branch.tokens.append(beam.history.tokens[-1])

    def _next_beam(self, candidate: _Candidate, branch: Branch, row: Floats) -> _Beam:
        history = candidate.parent.history.fork()
        history.append(candidate.token)
        emitted = (*candidate.parent.emitted, self._emitted(row, candidate.token))
        return _Beam(branch, history, candidate.score, candidate.constraint, emitted)

    def _emitted(self, row: Floats, token: int) -> Emitted:
        return Emitted(token) if self._settings.logprobs is None else with_logprobs(row, token, self._settings.logprobs)

    def _hypothesis(self, candidate: _Candidate, row: Floats, end: End, text: str | None) -> _Hypothesis:
        parent = candidate.parent
        tokens = [*parent.history.tokens[parent.history.prompt_length :], candidate.token]
        emitted = (*parent.emitted, self._emitted(row, candidate.token))
        return _Hypothesis(self._length_scored(candidate.score, self._generated), tokens, emitted, end, text)

    def _length_scored(self, score: np.float32, generated: int) -> float:
        return float(score) / float(generated**self._settings.length_penalty)

    def _end(self, group: _Group, end: End, generated: int) -> None:
        """The group's beams, which have `generated` tokens, become hypotheses as they are."""
        for beam in group.beams:
            tokens = beam.history.tokens[beam.history.prompt_length :]
            group.add(_Hypothesis(self._length_scored(beam.score, generated), tokens, beam.emitted, end, None))

    def _results(self, reason: str) -> list[FinishedSequence]:
        for group in self._groups:
            if not group.done:
                self._end(group, End(reason), self._generated)
        found = [hypothesis for group in self._groups for hypothesis in group.hypotheses]
        best = sorted(reversed(found), key=lambda h: -h.score)[: self._settings.results]
        return [_finished(hypothesis, number) for number, hypothesis in enumerate(best)]


def _finished(hypothesis: _Hypothesis, number: int) -> FinishedSequence:
    end = hypothesis.end
    return FinishedSequence(
        hypothesis.tokens,
        end.reason,
        [Emitted(e.token_id, e.logprob, e.top_logprobs, number) for e in hypothesis.emitted],
        hypothesis.score,
        number,
        None if end.is_text else len(hypothesis.tokens) - 1,
        hypothesis.text,
        end.stopped_by,
        end.error,
    )
