"""The engine's thread, and how other threads reach it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar, cast

from mnemos.contract import Model
from mnemos.engine.core import EngineCore, log_exception
from mnemos.engine.counters import Listener
from mnemos.engine.draft_model import DraftModel
from mnemos.engine.request import Request, State
from mnemos.engine.scheduler import Limits
from mnemos.errors import CapacityError, ConfigError, MnemosError, UnsupportedError
from mnemos.memory.capacity import Capacity, cache_bytes
from mnemos.memory.prefix import PrefixTree

if TYPE_CHECKING:
    from mnemos.engine.statistics import Statistics

T = TypeVar("T")


class EngineThread:
    """Runs steps as long as there are requests, and sleeps otherwise.

    Other threads put calls into the inbox; they run between two steps, so nothing else needs a lock. The thread starts
    with the first request. It has no reference to the engine object, so an engine that is no longer used is collected,
    and that ends the thread.
    """

    def __init__(
        self,
        model: Model,
        capacity: Capacity,
        limits: Limits,
        prefix_cache: bool,
        queue_size: int,
        draft_model: DraftModel | None = None,
    ) -> None:
        self.core = EngineCore(model, capacity, limits, prefix_cache, draft_model)
        self.queue_size = queue_size
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()  # for what callers do together: starting the thread, counting the queue, closing
        self._thread: threading.Thread | None = None
        self._process = 0  # the process that the thread runs in
        self._closed = False
        self._stopping = False
        self._entering = 0  # requests among the calls in the inbox; guarded by the lock

    # Called from any thread.

    def submit(self, request: Request) -> None:
        """Queues a request. CapacityError if the queue is full, MnemosError after close."""
        self._check_process()
        with self._lock:
            self._check_open()
            if len(self.core.scheduler.queue) + self._entering >= self.queue_size:
                self.core.counters.refused += 1
                if self.core.listeners:
                    self._inbox.put(partial(self.core.tell, "refused", request, time.perf_counter()))
                raise CapacityError(f"the queue is full: {self.queue_size} requests wait; try again later")
            self.core.counters.submitted += 1
            self._entering += 1
            self._post(partial(self._enter, request))

    def cancel(self, request: Request) -> None:
        """Ends a request soon; its sink keeps what was delivered so far."""
        if request.state is not State.ENDED:
            self._inbox.put(partial(self.core.cancel, request))

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function between two steps and returns its result."""
        self.check_thread()
        self._check_process()
        results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        with self._lock:
            self._check_open()
            self._post(partial(_call, function, results))
        result, error = results.get()
        if error is not None:
            raise error
        return cast(T, result)

    def close(self, drain: bool) -> None:
        """Ends the thread: once all requests are done, or immediately, ending them with an error."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None:
            return
        self._inbox.put(partial(self._stop, drain))
        if thread is not threading.current_thread():
            thread.join()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Adds a listener; returns a function that removes it."""
        core = self.core
        core.listeners = [*core.listeners, listener]

        def unsubscribe() -> None:
            core.listeners = [other for other in core.listeners if other is not listener]

        return unsubscribe

    @property
    def drafts(self) -> bool:
        """True if there is a draft model."""
        return self.core.draft_model is not None

    def check_length(self, prompt: int) -> None:
        """Raises CapacityError if a prompt of this length could not run even with all pages to itself."""
        scheduler = self.core.scheduler
        scheduler.tables.check_length(prompt, scheduler.limits.context_length)

    def prefix_tree(self) -> PrefixTree:
        """The prefix cache, which may only be used between two steps; see `call`.

        UnsupportedError for a model whose prefixes cannot be shared, ConfigError if the engine was created with
        prefix_cache=False.
        """
        tables, spec = self.core.scheduler.tables, self.core.model.spec
        if tables.tree is None:
            if not tables.shares_prefixes:
                raise UnsupportedError(f"{spec.architecture} cannot share cached prefixes between requests")
            raise ConfigError("prefix_cache is False; create the engine with prefix_cache=True to save or load one")
        return tables.tree

    def statistics(self) -> Statistics:
        """Statistics read while the engine runs: each number is right, but not necessarily at the same moment."""
        from mnemos.engine.statistics import Latency, Statistics  # not needed in most processes

        scheduler, counters = self.core.scheduler, self.core.counters
        tables = scheduler.tables
        pools, tree, states = tables.pools, tables.tree, tables.states
        return Statistics(
            waiting=len(scheduler.queue) + self._entering,
            running=len(scheduler.running),
            pages_total=sum(pool.total for pool in pools),
            pages_used=sum(pool.used for pool in pools),
            pages_cached=sum(pool.reclaimable for pool in pools),
            states_total=0 if states is None else states.total,
            states_used=0 if states is None else states.used,
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
            prefix_pages=0 if tree is None else len(tree),
            prefix_bytes=0 if tree is None else cache_bytes(self.core.model.spec.layout, tree.held),
            time_to_first_token=Latency.of(counters.first_token_seconds),
            inter_token_latency=Latency.of(counters.inter_token_seconds),
            drafted_tokens=counters.drafted,
            accepted_tokens=counters.accepted,
        )

    def check_thread(self) -> None:
        """Raises MnemosError if the caller is the engine's own thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise MnemosError("a callback of a request waits for the engine that runs it; call another engine")

    def _check_process(self) -> None:
        """Called before taking the lock, which another thread may have held when the process was forked."""
        if self._thread is not None and self._process != os.getpid():
            raise MnemosError(
                f"the engine runs in process {self._process}, of which this one is a fork, and no thread is forked: "
                "create an engine here, or start processes with multiprocessing's 'spawn'"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise MnemosError("the engine is closed; create a new one")

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        if self._thread is None:
            self._process = os.getpid()
            self._thread = threading.Thread(target=self._run, name="mnemos-engine", daemon=True)
            self._thread.start()

    # Called in the engine's thread.

    def _run(self) -> None:
        core, inbox = self.core, self._inbox
        while core.has_work or not self._stopping:
            try:
                if not core.has_work:
                    inbox.get()()
                while not inbox.empty():
                    inbox.get()()
                core.step()
                if core.rest:
                    self._pause(core.rest)
            except BaseException as error:  # a bug in the engine itself: no caller must be left waiting
                log_exception("a step failed; all requests end")
                self._fail_all(error)

    def _pause(self, seconds: float) -> None:
        """Lets the machine cool down; calls are answered meanwhile."""
        self.core.rest = 0.0
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0 and not self._stopping:
            try:
                self._inbox.get(timeout=left)()
            except Empty:
                return

    def _enter(self, request: Request) -> None:
        with self._lock:
            self._entering -= 1
        self.core.add(request)

    def _stop(self, drain: bool) -> None:
        self._stopping = True
        if not drain:
            self._fail_all(MnemosError("the engine was closed before the request was done"))

    def _fail_all(self, error: BaseException) -> None:
        for request in self.core.requests:
            self.core.fail(request, error)


def _call(function: Callable[[], T], results: SimpleQueue[tuple[T | None, BaseException | None]]) -> None:
    try:
        results.put((function(), None))
    except BaseException as error:
        results.put((None, error))
