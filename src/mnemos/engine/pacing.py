"""An engine that keeps to what a performance mode, the machine's heat and a memory limit leave it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from mnemos.contract import Model, PagedModel, ReleasingCache, ThreadedModel
from mnemos.engine.scheduler import Limits, Scheduler
from mnemos.machine.hardware import Hardware, detect
from mnemos.machine.memory import resident_memory
from mnemos.machine.performance import Allowance, Governor, allowance_for
from mnemos.machine.sensors import Conditions, NoSensors, Sensors, machine_sensors

_MEMORY_PERIOD = 0.5  # seconds between two looks at the process's memory
_TIGHT = 0.25  # of the batch, while the process takes more memory than it may
_ROOM_AGAIN = 0.95  # of the limit


class Pacer:
    """Called before each step, in the engine's thread. It changes when tokens come, never which ones.

    governor    how much of the machine the engine may use at the moment
    most_bytes  of memory that the process may take, 0 without a limit. Above it, unused prefixes are given up, the
                memory of free cache pages is given back to the system, and few sequences run until there is room again
    drafts      the model that drafts for the other, if there is one
    """

    def __init__(
        self,
        model: Model,
        governor: Governor,
        most_bytes: int = 0,
        resident: Callable[[], int] = resident_memory,
        now: Callable[[], float] = time.monotonic,
        drafts: Model | None = None,
    ) -> None:
        self.governor = governor
        self.most_bytes = most_bytes
        self._model = model
        self._drafts = drafts
        self._resident = resident
        self._now = now
        self._next_look = now()
        self._tight = False
        self._in_force: Allowance | None = None

    @property
    def allowance(self) -> Allowance:
        """What the engine may use now."""
        allowed = self.governor.allowance
        return allowed.scaled(1.0, _TIGHT, allowed.rest) if self._tight else allowed

    @property
    def conditions(self) -> Conditions:
        """The machine's latest."""
        return self.governor.conditions

    @property
    def rest(self) -> float:
        """How long to pause after a step, as a share of its time."""
        return 0.0 if self._in_force is None else self._in_force.rest

    def update(self, scheduler: Scheduler) -> None:
        """Reads what is due and puts the allowance in force."""
        changed = self.governor.update() or self._in_force is None
        if self.most_bytes and (now := self._now()) >= self._next_look:
            self._next_look = now + _MEMORY_PERIOD
            changed |= self._hold_memory(scheduler)
        if changed:
            allowed = self._in_force = self.allowance
            scheduler.restrict(allowed.sequences, allowed.batch_tokens)
            limit_threads(self._model, allowed.threads)
            if self._drafts is not None:
                limit_threads(self._drafts, allowed.threads)

    def _hold_memory(self, scheduler: Scheduler) -> bool:
        """Makes room if there is none; returns whether fewer sequences run from now on, or more again."""
        tight, resident = self._tight, self._resident()
        if resident > self.most_bytes:
            release_unused(scheduler, self._model)
            resident = self._resident()
        if resident > self.most_bytes:
            self._tight = True
        elif resident < _ROOM_AGAIN * self.most_bytes:
            self._tight = False
        return self._tight != tight


def make_pacer(
    model: Model,
    limits: Limits,
    mode: str | None,
    throttle: bool,
    most_bytes: int = 0,
    sensors: Sensors | None = None,
    hardware: Hardware | None = None,
    drafts: Model | None = None,
) -> Pacer:
    """A pacer for an engine with these limits.

    mode: see `allowance_for`; None: all that the engine has, or balanced if it is to throttle. throttle: whether it
    follows the machine's heat and power. sensors, hardware: by default this machine's. drafts: see `Pacer`.
    """
    if sensors is None:
        sensors = machine_sensors() if throttle else NoSensors()
    mode = mode or ("balanced" if throttle else "performance")
    most = Allowance(model_threads(model), limits.sequences, limits.batch_tokens)
    base = allowance_for(mode, hardware or detect(sensors), most)
    return Pacer(model, Governor(mode, base, sensors), most_bytes, drafts=drafts)


def model_threads(model: Model) -> int:
    """How many threads a model computes with: its own, or PyTorch's for a module; 1 where nobody can limit them."""
    if isinstance(model, ThreadedModel):
        return model.threads or 1
    torch = sys.modules.get("torch")
    return 1 if torch is None else int(torch.get_num_threads())


def limit_threads(model: Model, threads: int) -> None:
    """Has a model compute with that many threads; called in the thread that runs it.

    A module in memory computes with PyTorch's threads, whose number belongs to the thread that calls it.
    """
    if isinstance(model, ThreadedModel):
        if model.threads is not None:
            model.limit_threads(threads)
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def release_unused(scheduler: Scheduler, model: Model) -> None:
    """Gives up prefixes that no request uses, and the memory of all free pages."""
    tables = scheduler.tables
    if tables.tree is not None:
        for group, pool in enumerate(tables.pools):
            tables.tree.evict(pool.total, group)
    cache = _cache_of(model)
    if cache is not None:
        for group, pool in enumerate(tables.pools):
            cache.release(pool.free_pages(), group)


def _cache_of(model: Model) -> ReleasingCache | None:
    if model.spec.layout.layers == 0:
        return None
    paged: PagedModel = model  # type: ignore[assignment]  # what has layers has pages
    return paged.cache if isinstance(paged.cache, ReleasingCache) else None
