"""Sensors over simulated files and a simulated macOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mnemos.machine.sensors import Conditions, Heat, LinuxSensors, MacSensors, NoSensors


def put(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


ZONE = {
    "class/thermal/thermal_zone0/type": "acpitz",
    "class/thermal/thermal_zone0/temp": 40_000,
    "class/thermal/thermal_zone0/trip_point_0_type": "critical",
    "class/thermal/thermal_zone0/trip_point_0_temp": 100_000,
    "class/thermal/thermal_zone0/trip_point_1_type": "passive",
    "class/thermal/thermal_zone0/trip_point_1_temp": 85_000,
}


@pytest.mark.parametrize(
    ("degrees", "heat"),
    [
        (40, Heat.NOMINAL),
        (74.9, Heat.NOMINAL),
        (75, Heat.FAIR),
        (85, Heat.SERIOUS),
        (95, Heat.CRITICAL),
        (-273, Heat.NOMINAL),  # switched off
    ],
)
def test_heat_by_a_zones_trip_points(tmp_path: Path, degrees: float, heat: Heat) -> None:
    put(tmp_path, ZONE)
    sensors = LinuxSensors(tmp_path)
    assert sensors.names == ("acpitz",)
    put(tmp_path, {"class/thermal/thermal_zone0/temp": int(degrees * 1000)})
    assert sensors.read() == Conditions(heat, temperature=degrees if degrees > 0 else None)


def test_the_warmest_of_several_sensors_counts(tmp_path: Path) -> None:
    core = "class/hwmon/hwmon1"
    put(tmp_path, {**ZONE, f"{core}/name": "coretemp", "class/thermal/thermal_zone1/temp": 99_000})  # without limits
    put(tmp_path, {f"{core}/temp1_input": 50_000, f"{core}/temp1_max": 80_000, f"{core}/temp1_crit": 100_000})
    put(tmp_path, {f"{core}/temp2_input": 81_000, f"{core}/temp2_max": 80_000, f"{core}/temp2_crit": 100_000})
    put(tmp_path, {"class/hwmon/hwmon2/name": "nvme", "class/hwmon/hwmon2/temp1_input": 120_000})
    sensors = LinuxSensors(tmp_path)
    assert sensors.names == ("acpitz", "coretemp")
    assert sensors.read() == Conditions(Heat.SERIOUS, temperature=81)
    (tmp_path / core / "temp2_input").unlink()  # a sensor may go away
    assert sensors.read() == Conditions(temperature=50)


def test_a_processor_that_slows_itself_down_is_too_warm(tmp_path: Path) -> None:
    count = "devices/system/cpu/cpu3/thermal_throttle/core_throttle_count"
    put(tmp_path, {count: 7})
    sensors = LinuxSensors(tmp_path)
    assert sensors.read().heat is Heat.NOMINAL
    put(tmp_path, {count: 9})
    assert sensors.read().heat is Heat.SERIOUS
    assert sensors.read().heat is Heat.NOMINAL


def test_drawing_all_the_power_that_is_allowed(tmp_path: Path) -> None:
    folder = "class/powercap/intel-rapl:0"
    put(tmp_path, {f"{folder}/energy_uj": 0, f"{folder}/constraint_0_power_limit_uw": 15_000_000})
    time = 0.0
    sensors = LinuxSensors(tmp_path, now=lambda: time)
    time = 2.0
    put(tmp_path, {f"{folder}/energy_uj": 20_000_000})  # 10 W
    assert sensors.read().heat is Heat.NOMINAL
    time = 4.0
    put(tmp_path, {f"{folder}/energy_uj": 50_000_000})  # 15 W
    assert sensors.read().heat is Heat.FAIR
    time = 6.0
    put(tmp_path, {f"{folder}/energy_uj": 1_000})  # the counter has started again
    assert sensors.read().heat is Heat.NOMINAL


def test_battery(tmp_path: Path) -> None:
    supply = "class/power_supply"
    put(tmp_path, {f"{supply}/hidpp_battery_0/type": "Battery", f"{supply}/hidpp_battery_0/scope": "Device"})
    put(tmp_path, {f"{supply}/hidpp_battery_0/status": "Discharging"})  # a mouse
    assert not LinuxSensors(tmp_path).has_battery
    put(tmp_path, {f"{supply}/AC/type": "Mains", f"{supply}/AC/online": 0})
    put(tmp_path, {f"{supply}/BAT0/type": "Battery", f"{supply}/BAT0/capacity": 64})
    put(tmp_path, {f"{supply}/BAT0/status": "Discharging"})
    sensors = LinuxSensors(tmp_path)
    assert sensors.has_battery
    assert sensors.read() == Conditions(on_battery=True, charge=0.64)
    put(tmp_path, {f"{supply}/AC/online": 1, f"{supply}/BAT0/status": "Charging"})
    assert sensors.read() == Conditions(charge=0.64)


def test_a_machine_without_sensors(tmp_path: Path) -> None:
    assert LinuxSensors(tmp_path).read() == NoSensors().read() == Conditions()


class FakeMac:
    def __init__(self, model: str, state: int = 0, seconds: float | None = None, saves: bool = False) -> None:
        self.values: dict[str, str | int] = {"hw.model": model}
        self.state, self.seconds, self.saves = state, seconds, saves

    def sysctl(self, name: str) -> str | int | None:
        return self.values.get(name)

    def thermal_state(self) -> int:
        return self.state

    def low_power_mode(self) -> bool:
        return self.saves

    def seconds_of_battery(self) -> float | None:
        return self.seconds


def test_a_mac() -> None:
    mac: Any = FakeMac("MacBookPro18,3", state=2, seconds=-1, saves=True)
    sensors = MacSensors(mac)
    assert sensors.has_battery
    assert sensors.read() == Conditions(Heat.SERIOUS, on_battery=True, saving=True)
    mac.state, mac.seconds, mac.saves = 0, None, False
    assert sensors.read() == Conditions()
    desktop: Any = FakeMac("Macmini9,1", state=3)
    assert not MacSensors(desktop).has_battery
    assert MacSensors(desktop).read() == Conditions(Heat.CRITICAL)
