"""The engine's thread: it alone schedules, runs the model and asks strategies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from mnemos.decoding.strategy import Branch, Emitted, Rows
from mnemos.engine.scheduler import Limits, Scheduler
from mnemos.engine.sequence import Request, State
from mnemos.engine.statistics import Counters, Event, Latency, Listener, Statistics
from mnemos.engine.step import Step
from mnemos.errors import CapacityError, MnemosError
from mnemos.models.contract import Model
from mnemos.ops.batch import Output

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Runner:
    """Runs steps as long as there are requests, and sleeps otherwise.

    Other threads put calls into the inbox; they are done between two steps, so nothing else needs a lock. The thread
    starts with the first request. It knows nothing of the engine object, so an engine that nobody holds any more is
    collected, and that ends the thread.
    """

    def __init__(self, model: Model, pages: int, limits: Limits, prefix_cache: bool, queue_size: int) -> None:
        self.model = model
        self.scheduler = Scheduler(model, pages, limits, self._fail, prefix_cache)
        self.counters = Counters()
        self.listeners: list[Listener] = []
        self.queue_size = queue_size
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # of what callers do together: starting the thread, counting the queue, closing
        self._thread: threading.Thread | None = None
        self._closed = False
        self._stopping = False

    # From any thread.

    def submit(self, request: Request) -> None:
        """Queues a request. CapacityError if the queue is full, MnemosError after close."""
        with self._lock:
            self._check_open()
            if len(self.scheduler.queue) + self._inbox.qsize() >= self.queue_size:
                self.counters.refused += 1
                raise CapacityError(f"the queue is full: {self.queue_size} requests wait; try again later")
            self.counters.submitted += 1
            self._post(partial(self._add, request))

    def cancel(self, request: Request) -> None:
        """Ends a request soon; its sink gets what was delivered so far."""
        if request.state is not State.ENDED:
            self._inbox.put(partial(self._cancel, request))

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function between two steps and returns its result."""
        self.check_thread()
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            self._post(partial(_fulfil, future, function))
        return future.result()

    def close(self, drain: bool) -> None:
        """Ends the thread: after all requests are done, or at once, which ends them with an error."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None:
            return
        self._inbox.put(partial(self._stop, drain))
        if thread is not threading.current_thread():
            thread.join()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Adds a listener; returns what removes it."""
        self.listeners = [*self.listeners, listener]

        def unsubscribe() -> None:
            self.listeners = [other for other in self.listeners if other is not listener]

        return unsubscribe

    def statistics(self) -> Statistics:
        """Numbers are read while the engine runs: each is true, but they need not be of the same moment."""
        scheduler, counters = self.scheduler, self.counters
        pool, tree = scheduler.placement.pool, scheduler.placement.tree
        return Statistics(
            waiting=len(scheduler.queue) + self._inbox.qsize(),
            running=len(scheduler.running),
            pages_total=pool.total,
            pages_used=pool.used,
            pages_cached=pool.reclaimable,
            submitted=counters.submitted,
            refused=counters.refused,
            finished=counters.finished,
            cancelled=counters.cancelled,
            failed=counters.failed,
            preemptions=scheduler.preemptions,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            evaluated_tokens=counters.evaluated_tokens,
            steps=counters.steps,
            busy_seconds=counters.busy_seconds,
            model_seconds=counters.model_seconds,
            prefix_evictions=0 if tree is None else tree.evicted,
            time_to_first_token=Latency.of(counters.first_token_seconds),
            inter_token_latency=Latency.of(counters.inter_token_seconds),
            drafted_tokens=counters.drafted,
            accepted_tokens=counters.accepted,
        )

    def check_thread(self) -> None:
        """MnemosError if the caller is the engine's own thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise MnemosError("a callback of a request waits for the engine that runs it; call another engine")

    def _check_open(self) -> None:
        if self._closed:
            raise MnemosError("the engine is closed; make a new one")

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mnemos-engine", daemon=True)
            self._thread.start()

    # In the engine's thread.

    def _run(self) -> None:
        while True:
            if not self.scheduler.has_work:
                if self._stopping:
                    return
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            if self.scheduler.has_work:
                self._step()

    def _step(self) -> None:
        counters, scheduler = self.counters, self.scheduler
        began = time.perf_counter()
        step = scheduler.schedule(began)
        if step is None:
            return
        batch = step.batch()
        entered = time.perf_counter()
        try:
            output = self.model.forward(batch)
            _check_output(output, len(batch.logit_rows))
        except Exception as error:
            self._fail_all(step, error)
            return
        left = time.perf_counter()
        for request, rows in scheduler.collect(step, output):
            if request.state is State.RUNNING:
                self._advance(request, rows, left)
        scheduler.pace.observe(step.decode_rows, step.prefill_rows, left - entered)
        counters.steps += 1
        counters.evaluated_tokens += len(step.token_ids)
        counters.model_seconds += left - entered
        counters.busy_seconds += time.perf_counter() - began

    def _advance(self, request: Request, rows: dict[Branch, Rows], now: float) -> None:
        """Asks the strategy how to go on. What goes wrong in it ends its request alone."""
        try:
            advance = request.strategy.advance(rows)
            if advance.emitted:
                self._note_tokens(request, advance.emitted, now)
            if advance.branches:
                self.scheduler.place(request, advance.branches)
                if advance.emitted or advance.finished:
                    request.sink.deliver(advance.emitted, advance.finished)
                return
        except Exception as error:
            self._fail(request, error)
            return
        self.scheduler.finish(request)
        for finished in advance.finished:
            self._note_tokens(request, finished.emitted, now)
        request.timings.finished = now
        request.sink.deliver(advance.emitted, advance.finished)
        request.sink.end(None)
        self.counters.finished += 1
        self._tell("finished", request, now)

    def _note_tokens(self, request: Request, emitted: list[Emitted], now: float) -> None:
        times, counters = request.timings.tokens, self.counters
        for _ in emitted:
            if times:
                counters.inter_token_seconds.append(now - times[-1])
            else:
                counters.first_token_seconds.append(now - request.timings.submitted)
                counters.prompt_tokens += len(request.prompt)
                counters.cached_tokens += request.cached_tokens
                self._tell("first_token", request, now)
            times.append(now)
        counters.generated_tokens += len(emitted)

    def _add(self, request: Request) -> None:
        self.scheduler.add(request)
        self._tell("submitted", request, time.perf_counter())

    def _cancel(self, request: Request) -> None:
        if request.state is not State.ENDED:
            self.scheduler.finish(request)
            self.counters.cancelled += 1
            self._end(request, None, "cancelled")

    def _fail(self, request: Request, error: Exception) -> None:
        if request.state is State.ENDED:
            return
        self.scheduler.remove(request)
        self.counters.failed += 1
        self._end(request, error, "failed")

    def _fail_all(self, step: Step, error: Exception) -> None:
        for request, _, _ in step.items:
            self._fail(request, error)

    def _end(self, request: Request, error: Exception | None, kind: str) -> None:
        request.timings.finished = time.perf_counter()
        request.sink.end(error)
        self._tell(kind, request, request.timings.finished)

    def _stop(self, drain: bool) -> None:
        self._stopping = True
        if not drain:
            scheduler = self.scheduler
            for request in [*scheduler.running, *scheduler.queue.waiting()]:
                self._fail(request, MnemosError("the engine was closed before the request was done"))

    def _tell(self, kind: str, request: Request, now: float) -> None:
        if self.listeners:
            event = Event(kind, request.number, now - request.timings.submitted, len(request.timings.tokens))
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception:
                    self.listeners = [other for other in self.listeners if other is not listener]
                    logger.exception("a listener of engine events failed and is not called any more")


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _check_output(output: Output, rows: int) -> None:
    if len(output.logits) != rows or len(output.hidden) != rows:
        raise MnemosError(
            f"the model returned {len(output.logits)} rows of logits and {len(output.hidden)} hidden states; "
            f"{rows} were asked for"
        )
