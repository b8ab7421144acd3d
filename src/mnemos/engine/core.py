"""The engine's work, step by step: schedule, run the model, advance the strategies. One thread calls it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from mnemos.contract import ConditionedModel, Model
from mnemos.decoding.strategy import Emitted
from mnemos.engine.counters import Counters, Event, Listener
from mnemos.engine.draft_model import DraftModel
from mnemos.engine.drawing import draw_tokens
from mnemos.engine.evaluation import evaluate, evaluate_apart
from mnemos.engine.request import Request, State
from mnemos.engine.scheduler import Limits, Scheduler
from mnemos.memory.capacity import Capacity

if TYPE_CHECKING:
    from mnemos.engine.pacing import Pacer


class EngineCore:
    """Runs requests to completion; a failure ends the requests concerned and nothing else."""

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        limits: Limits,
        prefix_cache: bool = True,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.model = model
        self.draft_model = draft_model
        self.scheduler = Scheduler(
            model, capacity, limits, self.fail, prefix_cache, partial(self.tell, "started"), self._begin
        )
        self.counters = Counters()
        self.listeners: list[Listener] = []
        self.pacer: Pacer | None = None
        self.rest = 0.0  # seconds to pause before the next step, for a machine that is too warm

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def requests(self) -> list[Request]:
        """All running and waiting requests."""
        return [*self.scheduler.running, *self.scheduler.queue.waiting()]

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.tell("submitted", request, time.perf_counter())
        if request.memory is not None:
            self._recall(request)

    def cancel(self, request: Request) -> None:
        """Ends a request that is no longer wanted; its sink keeps what was delivered."""
        if request.state is not State.ENDED:
            self.scheduler.finish(request)
            self.counters.cancelled += 1
            self._end(request, None, "cancelled")

    def fail(self, request: Request, error: BaseException) -> None:
        if request.state is not State.ENDED:
            self.scheduler.remove(request)
            self.counters.failed += 1
            self._end(request, error, "failed")

    def step(self) -> None:
        """Evaluates one batch, if there is anything to evaluate, and advances the strategies concerned."""
        counters, scheduler = self.counters, self.scheduler
        if self.pacer is not None:
            self.pacer.update(scheduler)
        began = time.perf_counter()
        step = scheduler.schedule(began)
        if step is None:
            return
        batch = step.batch()
        entered = time.perf_counter()
        try:
            output = evaluate(self.model, batch, step.known)
        except BaseException as error:  # in the engine's thread also SystemExit is a failure like any other
            output, failed = evaluate_apart(self.model, step, batch, error)
            for request, reason in failed.items():
                self.fail(request, reason)
        left = time.perf_counter()
        ready = scheduler.collect(step, output)
        draw_tokens(step, output)
        for request in ready:
            if request.state is State.RUNNING:
                self._advance(request, left)
        for request in ready:  # not sooner: a woken reader would take the interpreter from the other deliveries
            request.sink.ring()
        if self.draft_model is not None:
            self._draft(self.draft_model, [request for request in ready if request.state is State.RUNNING])
        scheduler.budget.observe(step.decode_rows, step.prefill_rows, left - entered)
        counters.steps += 1
        counters.evaluated_tokens += len(step.token_ids)
        counters.model_seconds += left - entered
        took = time.perf_counter() - began
        counters.busy_seconds += took
        if self.pacer is not None:
            self.rest = self.pacer.rest * took

    def _recall(self, request: Request) -> None:
        """Has the cache keep an index of keys, from the first request on that has a memory of its own."""
        from mnemos.memory.policy import begin_recall

        try:
            begin_recall(self.model, self.scheduler.tables.tree)
        except BaseException as error:
            self.fail(request, error)

    def _begin(self, request: Request, state: int) -> None:
        """For a model with an encoder: has it read the request's source into a sequence's clear state slot."""
        if isinstance(self.model, ConditionedModel):
            began = time.perf_counter()
            self.model.begin(state, request.source or request.prompt)
            self.counters.model_seconds += time.perf_counter() - began

    def _advance(self, request: Request, now: float) -> None:
        """Asks the strategy how to continue. An error in it ends only its own request."""
        try:
            advance = request.strategy.advance(request.rows())
            self.counters.drafted += advance.drafted
            self.counters.accepted += advance.accepted
            if advance.emitted:
                self._note_tokens(request, advance.emitted, now)
            if advance.branches:
                if advance.emitted or advance.finished:
                    request.sink.deliver(advance.emitted, advance.finished)
                self.scheduler.place(request, advance.branches)
                return
        except BaseException as error:  # also a panic of the grammars' library
            self.fail(request, error)
            return
        self.scheduler.finish(request)
        self._forget_drafts(request)
        for finished in advance.finished:
            if finished.emitted:
                self._note_tokens(request, finished.emitted, now)
        request.timings.finished = now
        request.sink.deliver(advance.emitted, advance.finished)
        request.sink.end(None)
        self.counters.finished += 1
        self.tell("finished", request, now)

    def _draft(self, draft_model: DraftModel, requests: list[Request]) -> None:
        """Has the draft model guess the next tokens of texts. If it fails, they continue without drafts."""
        before = draft_model.seconds
        try:
            drafted = draft_model.extend(requests)
        except Exception:
            draft_model.give_up()
            drafted = [request for request in requests if request.state is State.RUNNING]
            log_exception("the draft model failed; requests continue without drafts")
        for request in drafted:
            self.scheduler.place(request, [sequence.branch for sequence in request.sequences])
        self.counters.model_seconds += draft_model.seconds - before

    def _forget_drafts(self, request: Request) -> None:
        if self.draft_model is not None:
            self.draft_model.forget(request)

    def _note_tokens(self, request: Request, emitted: list[Emitted], now: float) -> None:
        times, counters = request.timings.tokens, self.counters
        for _ in emitted:
            if times:
                counters.inter_token_seconds.append(now - times[-1])
            else:
                counters.first_token_seconds.append(now - request.timings.submitted)
                counters.prompt_tokens += len(request.source or request.prompt)
                counters.cached_tokens += request.cached_tokens
                self.tell("first_token", request, now)
            times.append(now)
        counters.generated_tokens += len(emitted)

    def _end(self, request: Request, error: BaseException | None, kind: str) -> None:
        self._forget_drafts(request)
        request.timings.finished = time.perf_counter()
        request.sink.end(error)
        self.tell(kind, request, request.timings.finished)

    def tell(self, kind: str, request: Request, now: float) -> None:
        """Notifies the listeners of an event in a request's life."""
        if self.listeners:
            event = Event(kind, request.number, now - request.timings.submitted, len(request.timings.tokens))
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception:
                    self.listeners = [other for other in self.listeners if other is not listener]
                    log_exception("a listener of engine events failed and is no longer called")


def log_exception(message: str) -> None:
    """Logs the exception being handled."""
    import logging  # not at the top: most programs never need it, and it takes time to load

    logging.getLogger("mnemos.engine").exception(message)
