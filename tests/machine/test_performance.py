"""An engine's share of the machine: by mode, heat and power, shrinking at once and recovering step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mnemos.errors import ConfigError
from mnemos.machine.hardware import detect
from mnemos.machine.performance import RECOVERY, Allowance, Governor, allowance_for, level_for
from mnemos.machine.sensors import Conditions, Heat

MOST = Allowance(threads=8, sequences=64, batch_tokens=512)


def test_modes() -> None:
    hybrid = replace(detect(), performance_cores=6, efficiency_cores=2)
    assert allowance_for("performance", hybrid, MOST) == MOST
    assert allowance_for("balanced", hybrid, MOST) == replace(MOST, threads=6)
    assert allowance_for("efficiency", hybrid, MOST) == Allowance(4, 32, 256)
    assert allowance_for("efficiency", hybrid, Allowance(1, 1, 1)) == Allowance(1, 1, 1)
    with pytest.raises(ConfigError, match="performance_mode is 'turbo'; it must be one of performance, balanced"):
        allowance_for("turbo", hybrid, MOST)


@pytest.mark.parametrize(
    ("conditions", "performance", "balanced"),
    [
        (Conditions(), 0, 0),
        (Conditions(Heat.FAIR), 0, 1),
        (Conditions(Heat.SERIOUS), 2, 2),
        (Conditions(Heat.CRITICAL), 3, 3),
        (Conditions(on_battery=True), 0, 1),
        (Conditions(on_battery=True, charge=0.1), 0, 2),
        (Conditions(charge=0.1), 0, 0),  # charging
        (Conditions(saving=True), 0, 1),
        (Conditions(Heat.SERIOUS, on_battery=True), 2, 2),
    ],
)
def test_levels(conditions: Conditions, performance: int, balanced: int) -> None:
    assert (level_for("performance", conditions), level_for("balanced", conditions)) == (performance, balanced)
    assert level_for("efficiency", conditions) == balanced


class FakeSensors:
    names = ("fake",)
    has_battery = True

    def __init__(self) -> None:
        self.conditions = Conditions()
        self.readings = 0

    def read(self) -> Conditions:
        self.readings += 1
        return self.conditions


def test_down_at_once_and_up_step_by_step() -> None:
    time = 100.0
    sensors = FakeSensors()
    governor = Governor("balanced", MOST, sensors, lambda: time)
    assert not governor.update()
    assert governor.allowance == MOST
    sensors.conditions = Conditions(Heat.CRITICAL)
    assert not governor.update()  # not yet time to read again
    assert sensors.readings == 1
    time += 2
    assert governor.update()
    assert governor.allowance == Allowance(1, 1, 32, rest=1.0)
    sensors.conditions = Conditions(Heat.FAIR)
    levels = []
    for _ in range(int(4 * RECOVERY / 2)):
        time += 2
        governor.update()
        levels.append(governor.level)
    assert sorted(levels, reverse=True) == levels  # never down again
    assert levels[:5] == [3] * 5
    assert set(levels) == {3, 2, 1}  # as cool as it gets
    assert governor.allowance == Allowance(6, 32, 256)
    sensors.conditions = Conditions()
    for _ in range(int(2 * RECOVERY / 2)):
        time += 2
        governor.update()
    assert governor.allowance == MOST


def test_a_moment_of_heat_begins_the_recovery_anew() -> None:
    time = 0.0
    sensors = FakeSensors()
    governor = Governor("balanced", MOST, sensors, lambda: time)
    for number in range(20):
        sensors.conditions = Conditions(Heat.SERIOUS if number % 3 == 0 else Heat.NOMINAL)
        governor.update()
        time += 2
        assert governor.level == 2
