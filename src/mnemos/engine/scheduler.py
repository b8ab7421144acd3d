"""Which tokens are evaluated next: continuous batching over cache pages."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from mnemos.contract import Floats, Model, Output
from mnemos.decoding.strategy import Branch
from mnemos.engine.admission import Admission, less_entitled
from mnemos.engine.branches import Branches
from mnemos.engine.prefill_budget import PrefillBudget
from mnemos.engine.queue import WaitingQueue
from mnemos.engine.request import Request, State
from mnemos.engine.sequence import Sequence
from mnemos.engine.step import Step
from mnemos.errors import CapacityError
from mnemos.memory.capacity import Capacity
from mnemos.memory.page_table import PageTables
from mnemos.memory.states import NO_STATE


@dataclass(frozen=True)
class Limits:
    """Limits on a sequence's positions, on the rows of a step with a prompt, and on branches that run at once."""

    context_length: int
    batch_tokens: int = 512
    sequences: int = 64


class Scheduler:
    """Decides what each step evaluates. All methods are called from one thread.

    A step takes the running requests in order of (priority, admission): all rows of those that decode, and chunks of
    prompts as far as the token budget reaches. Then waiting requests are admitted if there are pages for them. When
    pages run out, unused prefixes are evicted, then the last running request is preempted: its pages are freed, and it
    waits and is recomputed, which changes nothing but the time. A request that cannot continue is passed to `fail`;
    `begin` is called with a request and the clear state slot of one of its sequences before that is evaluated.
    """

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        limits: Limits,
        fail: Callable[[Request, Exception], None],
        prefix_cache: bool = True,
        on_start: Callable[[Request, float], None] = lambda request, now: None,
        begin: Callable[[Request, int], None] = lambda request, state: None,
    ) -> None:
        self.limits = limits
        self.chunks = model.spec.chunks
        self.tables = PageTables(model, capacity, prefix_cache, limits.batch_tokens)
        self.branches = Branches(self.tables, limits.context_length)
        self.admission = Admission(self.branches, limits.sequences)
        self.queue = WaitingQueue()
        self.running: list[Request] = []
        self.budget = PrefillBudget(limits.batch_tokens)
        self.preemptions = 0
        self._fail = fail
        self._on_start = on_start
        self._begin = begin
        self._admissions = count(1)

    @property
    def has_work(self) -> bool:
        return bool(self.running or len(self.queue))

    # Requests come and go.

    def add(self, request: Request) -> None:
        self.queue.enter(request)

    def remove(self, request: Request) -> None:
        """Called when the request has ended, for whatever reason: frees its pages."""
        if request.state is State.ENDED:
            return
        if request.state is State.RUNNING:
            self.running.remove(request)
        else:
            self.queue.remove(request)
        request.state = State.ENDED
        self.branches.release(request)
        self.queue.leave(request)

    def finish(self, request: Request) -> None:
        """Called when the request is done: caches its prefixes for others and frees its pages."""
        self.branches.remember(request)
        self.remove(request)

    def place(self, request: Request, branches: list[Branch]) -> None:
        """Continues with `branches`; forks share pages with their parents, and all other branches' pages are freed."""
        self.branches.place(request, branches)

    def restrict(self, sequences: int, batch_tokens: int) -> None:
        """Has at most this many branches running from now on, and rows in a step with part of a prompt.

        Requests beyond the first number wait until there is room again, the last admitted ones first.
        """
        self.admission.most, self.budget.batch_tokens = sequences, batch_tokens
        running = sum(request.strategy.max_branches for request in self.running)
        while running > sequences and len(self.running) > 1:
            running -= self.running[-1].strategy.max_branches
            self._preempt(self.running[-1])

    # A step.

    def schedule(self, now: float) -> Step | None:
        """The next step's rows, None if there is nothing to evaluate."""
        if len(self.queue):
            self._expire(now)
            self._make_way()
        step, chunk = Step(), self._chunk()
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if not request.prefilling and self._plan_one(step, request):
                index += 1
                continue
            rows = self._plan(step, request, chunk)
            chunk -= rows if request.prefilling else 0
            index += request.state is State.RUNNING
        while chunk > 0 and (candidate := self.queue.peek()) and self.admission.fits(candidate, self.running):
            self._admit(candidate, now)
            if candidate.state is State.RUNNING:
                chunk -= self._plan(step, candidate, chunk, newcomer=True)
        return step if step.items else None

    def collect(self, step: Step, output: Output) -> list[Request]:
        """Takes over a step's output; returns the requests whose strategies can be advanced."""
        ready: list[Request] = []
        logits, hidden = output.logits, output.hidden
        charge, branches, slides = self.queue.charge, self.branches, self.tables.slides
        for request, parts, complete in step.items:
            rows = 0
            for sequence, number, start, end in parts:
                sequence.advance(number)
                rows += number
                if start < end:
                    sequence.take(logits[start:end], hidden[start:end], complete)
            request.pending -= rows
            charge(request.tenant, rows)
            if request.prefilling or slides:
                branches.settle(request)
            if complete:
                ready.append(request)
        if output.early is not None:
            _keep_early(step, output.early)
        return ready

    def _expire(self, now: float) -> None:
        """Fails the requests that have not started by their deadline."""
        for request in self.queue.expired(now):
            waited = now - request.timings.submitted
            self._fail(request, CapacityError(f"request waited {waited:.3f} s in the queue, past its deadline"))

    def _chunk(self) -> int:
        """The most prompt rows that this step may contain."""
        decode_rows, prompts = 0, len(self.queue)
        for request in self.running:
            if request.prefilling:
                prompts += 1
            else:
                decode_rows += request.pending
        return self.budget.chunk(decode_rows, prompts) if prompts else 0

    def _plan_one(self, step: Step, request: Request) -> bool:
        """Puts the next row of a request into the step that decodes one text; False if that is not all it needs.

        A shortcut for `_plan`, taken by most rows of most steps.
        """
        if request.pending != 1 or len(request.sequences) != 1:
            return False
        sequence = request.sequences[0]
        if not self.tables.holds_next(sequence):
            return False
        step.add_one(request, sequence)
        return True

    def _plan(self, step: Step, request: Request, chunk: int, newcomer: bool = False) -> int:
        """Adds a request's next rows to the step, at most `chunk` while it is prefilling; returns their number.

        If prompts must not be cut, the one that reaches the end of the chunk exceeds it.
        """
        try:
            planned: list[tuple[Sequence, int]] = []
            total = 0
            for sequence in request.sequences:
                rows = self.branches.prepare(request, sequence)
                if sequence.done < sequence.whole:
                    rows = min(rows, sequence.whole - sequence.done)
                if request.prefilling:
                    rows = min(rows, chunk - total) if self.chunks or total >= chunk else rows
                if rows <= 0:
                    continue
                if not self._reserve(request, sequence, rows, newcomer):
                    break
                planned.append((sequence, rows))
                total += rows
        except Exception as error:
            self._fail(request, error)
        if request.state is not State.RUNNING or not planned:
            return 0
        step.add(request, planned, total)
        return total

    def _reserve(self, request: Request, sequence: Sequence, rows: int, newcomer: bool) -> bool:
        """Secures pages and a state for a sequence's next rows; False if this step has no room for them."""
        tables = self.tables
        while not tables.make_room(sequence, rows):
            if newcomer:  # all others are in the step already
                return False
            victim = self.running[-1]
            if len(self.running) == 1:
                tables.refuse(sequence, rows)
            self._preempt(victim)
            if victim is request:
                return False
        fresh = sequence.state == NO_STATE
        tables.extend(sequence, rows)
        if fresh and sequence.state != NO_STATE:
            self._begin(request, sequence.state)
        return True

    # Admission and preemption.

    def _admit(self, request: Request, now: float) -> None:
        self.queue.remove(request)
        request.state = State.RUNNING
        request.rank = (request.priority, next(self._admissions))
        insort(self.running, request, key=_rank)
        if request.started:
            return
        request.started = True
        request.timings.started = now
        self._on_start(request, now)
        try:
            self.branches.start(request)
        except Exception as error:
            self._fail(request, error)

    def _make_way(self) -> None:
        """Preempts a request for the next waiting one if that is more urgent or its tenant has nothing running."""
        while (candidate := self.queue.peek()) is not None and not self.admission.fits(candidate, self.running):
            victim = less_entitled(candidate, self.running)
            if victim is None:
                return
            self._preempt(victim)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        request.state = State.WAITING
        self.branches.remember(request)
        self.branches.suspend(request)
        self.queue.put_back(request)
        self.preemptions += 1
        request.preemptions += 1


def _keep_early(step: Step, early: Floats) -> None:
    """Gives each sequence a copy of its rows of the early layers that its branch names."""
    for _, parts, _ in step.items:
        for sequence, _, start, end in parts:
            if start < end and (layers := sequence.branch.early_layers):
                sequence.early = early[[step.early_layers.index(layer) for layer in layers], start:end]


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
