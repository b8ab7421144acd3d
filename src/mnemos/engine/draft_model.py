"""Speculation with a small model: in its own ragged batches, it drafts the tokens that the large one verifies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from mnemos.contract import Model
from mnemos.decoding.strategy import Advance, Branch, Emitted, FinishedSequence, Rows
from mnemos.engine.evaluation import evaluate
from mnemos.engine.request import Request, State, Timings
from mnemos.engine.scheduler import Limits, Scheduler
from mnemos.errors import MnemosError
from mnemos.memory.capacity import Capacity


class DraftModel:
    """The draft model, with its own scheduler and cache pages.

    It holds a copy of every branch whose strategy asks for drafts. A copy first catches up with its original, in chunks
    if that is a whole prompt, and then drafts together with all other copies; an original whose copy is still reading
    its prompt, or finds no pages, continues without drafts.
    """

    def __init__(self, model: Model, capacity: Capacity, limits: Limits) -> None:
        self.model = model
        self.scheduler = Scheduler(model, capacity, limits, self._give_up)
        self.seconds = 0.0  # in the model
        self._copies: dict[Request, dict[Branch, Request | None]] = {}  # None: given up

    def extend(self, requests: Sequence[Request]) -> list[Request]:
        """Appends drafts to the branches of running requests that ask for them; returns the requests concerned."""
        wishes: dict[Request, tuple[Request, Branch]] = {}
        for request in requests:
            self._forget_ended(request)
            for sequence in request.sequences:
                if sequence.branch.drafts > 0 and (copy := self._copy(request, sequence.branch)) is not None:
                    wishes[copy] = request, sequence.branch
        self._write(wishes)
        return list(dict.fromkeys(request for request, branch in wishes.values() if branch.wanted > 1))

    def forget(self, request: Request) -> None:
        """Called when the request has ended: frees the pages of its copies."""
        for copy in self._copies.pop(request, {}).values():
            if copy is not None:
                self.scheduler.finish(copy)

    def give_up(self) -> None:
        """Ends all copies; running requests continue without drafts."""
        for copies in self._copies.values():
            for copy in copies.values():
                if copy is not None:
                    self._give_up(copy)

    def _copy(self, request: Request, branch: Branch) -> Request | None:
        """The draft model's copy of a branch, set to evaluate the branch's tokens."""
        copies = self._copies.setdefault(request, {})
        if branch not in copies:
            copy = copies[branch] = _copy_of(request, branch)
            self.scheduler.add(copy)
            return copy
        known = copies[branch]
        if known is None:
            return None
        known.prompt = list(branch.tokens)  # a copy that has not started yet begins with this
        if known.started:
            own = known.sequences[0].branch
            own.truncate(_common(own.tokens, branch.tokens))
            own.tokens += branch.tokens[len(own.tokens) :]
            self._place(known)
        return None if known.state is State.ENDED else known

    def _write(self, wishes: Mapping[Request, tuple[Request, Branch]]) -> None:
        """Runs the model until every copy that has read its prompt has drafted as much as was asked for."""
        busy = bool(wishes)
        while busy and (step := self.scheduler.schedule(time.perf_counter())) is not None:
            began = time.perf_counter()
            output = evaluate(self.model, step.batch())
            seconds = time.perf_counter() - began
            self.seconds += seconds
            for copy in self.scheduler.collect(step, output):
                rows = copy.rows()
                if copy in wishes:
                    self._append(copy, wishes[copy][1], rows)
            self.scheduler.budget.observe(step.decode_rows, step.prefill_rows, seconds)
            busy = any(copy.pending and not copy.prefilling for copy in self.scheduler.running)

    def _append(self, copy: Request, branch: Branch, rows: Mapping[Branch, Rows]) -> None:
        ((own, given),) = rows.items()
        token = int(given.logits[-1].argmax())
        branch.tokens.append(token)
        branch.wanted += 1
        branch.drafts -= 1
        if branch.drafts:
            own.tokens.append(token)
            self._place(copy)

    def _place(self, copy: Request) -> None:
        try:
            self.scheduler.place(copy, [copy.sequences[0].branch])
        except MnemosError as error:  # beyond the draft model's context
            self._give_up(copy, error)

    def _give_up(self, copy: Request, error: Exception | None = None) -> None:
        """Ends a copy that cannot continue; its original continues without drafts."""
        self.scheduler.remove(copy)
        for copies in self._copies.values():
            for branch, known in copies.items():
                if known is copy:
                    copies[branch] = None

    def _forget_ended(self, request: Request) -> None:
        """Forgets the copies of results that have ended, while others of the request continue."""
        copies = self._copies.get(request)
        if copies:
            live = {sequence.branch for sequence in request.sequences}
            for branch in [branch for branch in copies if branch not in live]:
                copy = copies.pop(branch)
                if copy is not None:
                    self.scheduler.finish(copy)


class _Copy:
    """A strategy that DraftModel drives from outside."""

    needs_all_prompt_rows = False
    max_branches = 1

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        return [Branch(prompt)]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        raise NotImplementedError("a copy is advanced by its original's choices")


class _Nowhere:
    """A sink for copies, which have no results."""

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None:
        """Never called."""

    def ring(self) -> None:
        """Never called."""

    def end(self, error: BaseException | None) -> None:
        """Never called."""


def _copy_of(request: Request, branch: Branch) -> Request:
    return Request(
        _Copy(),
        list(branch.tokens),
        _Nowhere(),
        Timings(time.perf_counter()),
        priority=request.priority,
        tenant=request.tenant,
        salt=request.salt,
        sliding=request.sliding,
    )


def _common(own: list[int], other: list[int]) -> int:
    """The length of the common prefix."""
    length = min(len(own), len(other))
    if own[:length] == other[:length]:
        return length
    return next(index for index in range(length) if own[index] != other[index])
