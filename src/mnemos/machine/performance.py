"""How much of a machine an engine uses: by its mode, and by the machine's heat and power at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from mnemos.machine.hardware import Hardware
from mnemos.machine.sensors import Conditions, Heat, Sensors
from mnemos.rules import PERFORMANCE_MODE

PERIOD = 2.0  # seconds between two readings of the sensors
RECOVERY = 10.0  # seconds of better conditions before an engine goes up a level again
_LOW_CHARGE = 0.2
_SMALLEST_PIECE = 32  # rows of a step with part of a prompt


@dataclass(frozen=True)
class Allowance:
    """What an engine may use.

    threads       that compute
    sequences     that run at once
    batch_tokens  rows of a step with part of a prompt
    rest          how long to pause after a step, as a share of the step's time
    """

    threads: int
    sequences: int
    batch_tokens: int
    rest: float = 0.0

    def scaled(self, threads: float, batch: float, rest: float = 0.0) -> Allowance:
        """These shares of it, at least one of each, with this rest.

        Pieces of a prompt stay large enough for their rows to share the reading of the weights.
        """
        return Allowance(
            max(1, ceil(threads * self.threads)),
            max(1, int(batch * self.sequences)),
            max(min(_SMALLEST_PIECE, self.batch_tokens), int(batch * self.batch_tokens)),
            rest,
        )


# The shares of threads and batch, and the rest, by level: 0 is all that the mode allows.
_LEVELS = ((1.0, 1.0, 0.0), (0.75, 0.5, 0.0), (0.5, 0.25, 0.25), (0.0, 0.0, 1.0))


def allowance_for(mode: str, hardware: Hardware, most: Allowance) -> Allowance:
    """What a mode allows of `most` while the machine is cool and on mains.

    performance: everything. balanced: as many threads as there are performance cores. efficiency: half of the threads
    and of the batch, which takes longer and draws less.
    """
    PERFORMANCE_MODE.apply("performance_mode", mode)
    if mode == "performance":
        return most
    if mode == "balanced":
        return most.scaled(min(1.0, hardware.performance_cores / most.threads), 1.0)
    return most.scaled(0.5, 0.5)


def level_for(mode: str, conditions: Conditions) -> int:
    """The level, 0 to 3, of an engine in this mode under these conditions.

    A level up from nominal for each degree of heat; in performance mode the first one is ignored, and so is the
    battery. On a battery the level is at least 1, at least 2 when its charge is low.
    """
    heat = int(conditions.heat)
    if mode == "performance":
        return 0 if heat <= Heat.FAIR else heat
    on_battery = conditions.on_battery or conditions.saving
    low = conditions.on_battery and conditions.charge is not None and conditions.charge < _LOW_CHARGE
    return max(heat, 2 if low else int(on_battery))


class Governor:
    """Follows a machine's conditions: down at once, up again a level at a time, after some seconds of better ones.

    base: what the mode allows, at level 0. now: a clock, in seconds. `conditions` are the latest.
    """

    def __init__(self, mode: str, base: Allowance, sensors: Sensors, now: Callable[[], float] = time.monotonic) -> None:
        self.mode = PERFORMANCE_MODE.apply("performance_mode", mode)
        self.base = base
        self.level = 0
        self.conditions = Conditions()
        self._sensors = sensors
        self._now = now
        self._next_reading = now()
        self._better_since: float | None = None

    @property
    def allowance(self) -> Allowance:
        """What the present level allows."""
        return self.base.scaled(*_LEVELS[self.level])

    def update(self) -> bool:
        """Reads the sensors if it is time to; returns whether the level has changed."""
        now = self._now()
        if now < self._next_reading:
            return False
        self._next_reading = now + PERIOD
        self.conditions = self._sensors.read()
        wanted, before = level_for(self.mode, self.conditions), self.level
        if wanted >= self.level:
            self.level, self._better_since = wanted, None
        elif self._better_since is None:
            self._better_since = now
        elif now - self._better_since >= RECOVERY:
            self.level, self._better_since = self.level - 1, now
        return self.level != before
