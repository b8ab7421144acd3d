"""How warm the machine is and where its power comes from, as the operating system tells it."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

_NEAR = 10.0  # degrees below the limit where a machine counts as warm
_LAST = 5.0  # degrees below the temperature at which it switches itself off
_MARGIN = 15.0  # of a sensor that names no temperature to slow down at, below the one at which it switches off
_PLAUSIBLE = (0.0, 150.0)  # degrees; sensors that are switched off report other values
_AT_LIMIT = 0.98  # of the power limit: at it, within the meter's precision


class Heat(IntEnum):
    """How warm the machine is: `FAIR` is near its limit, `SERIOUS` at it, `CRITICAL` near switching off."""

    NOMINAL = 0
    FAIR = 1
    SERIOUS = 2
    CRITICAL = 3


@dataclass(frozen=True)
class Conditions:
    """A moment's readings. temperature: of the warmest sensor in degrees Celsius, None where the system names none.

    charge: of the battery, 0 to 1, None without one. saving: the user has asked the system to save energy.
    """

    heat: Heat = Heat.NOMINAL
    on_battery: bool = False
    charge: float | None = None
    temperature: float | None = None
    saving: bool = False


class Sensors(Protocol):
    """What reads a machine's conditions; cheap enough for every other second."""

    names: tuple[str, ...]  # of its thermal sensors
    has_battery: bool

    def read(self) -> Conditions: ...


class NoSensors:
    """A system that says nothing: always cool and on mains."""

    names: tuple[str, ...] = ()
    has_battery = False

    def read(self) -> Conditions:
        """The best of conditions."""
        return Conditions()


@dataclass(frozen=True)
class _Thermometer:
    """A file with a temperature in thousandths of a degree. slow: where the machine has to slow down; off: the end."""

    name: str
    file: Path
    slow: float
    off: float

    def heat(self, degrees: float) -> Heat:
        if degrees >= self.off - _LAST:
            return Heat.CRITICAL
        if degrees >= self.slow:
            return Heat.SERIOUS
        return Heat.FAIR if degrees >= self.slow - _NEAR else Heat.NOMINAL


class LinuxSensors:
    """Thermal zones, processors' own sensors, throttling and power limits, and batteries, from `/sys`.

    A machine whose processor has slowed itself down since the last reading is at its limit, whatever its sensors say,
    and one that draws all the power it may is near it. root: another folder with the same files. now: a clock, seconds.
    """

    def __init__(self, root: Path = Path("/sys"), now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._thermometers = [*_zones(root / "class" / "thermal"), *_processors(root / "class" / "hwmon")]
        self._throttled = sorted(root.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"))
        self._meters = [folder for folder in sorted(root.glob("class/powercap/*:*")) if (folder / "energy_uj").exists()]
        self._supplies = [
            folder for folder in sorted(root.glob("class/power_supply/*")) if _text(folder / "scope") != "Device"
        ]
        self.names = tuple(dict.fromkeys(one.name for one in self._thermometers))
        self.has_battery = any(_text(folder / "type") == "Battery" for folder in self._supplies)
        self._count = self._throttle_count()
        self._energy = {folder: (self._now(), _number(folder / "energy_uj")) for folder in self._meters}

    def read(self) -> Conditions:
        """The present conditions; a sensor that cannot be read is left out."""
        degrees = {one: value / 1000 for one in self._thermometers if (value := _number(one.file)) is not None}
        valid = {one: value for one, value in degrees.items() if _PLAUSIBLE[0] < value < _PLAUSIBLE[1]}
        heat = max((one.heat(value) for one, value in valid.items()), default=Heat.NOMINAL)
        count = self._throttle_count()
        if count > self._count:
            heat = max(heat, Heat.SERIOUS)
        self._count = count
        if self._is_power_limited():
            heat = max(heat, Heat.FAIR)
        on_battery, charge = self._battery()
        return Conditions(heat, on_battery, charge, max(valid.values(), default=None))

    def _throttle_count(self) -> int:
        return sum(_number(file) or 0 for file in self._throttled)

    def _is_power_limited(self) -> bool:
        limited = False
        for folder in self._meters:
            before, energy = self._energy[folder]
            now, used = self._now(), _number(folder / "energy_uj")
            self._energy[folder] = now, used
            limit = _number(folder / "constraint_0_power_limit_uw")
            if energy is None or used is None or used < energy or not limit or now <= before:
                continue  # not readable, or the counter has started again
            limited |= (used - energy) / (now - before) >= _AT_LIMIT * limit
        return limited

    def _battery(self) -> tuple[bool, float | None]:
        charges, discharging, plugged = [], False, False
        for folder in self._supplies:
            if _text(folder / "type") == "Battery":
                discharging |= _text(folder / "status") == "Discharging"
                percent = _number(folder / "capacity")
                charges += [] if percent is None else [percent / 100]
            else:
                plugged |= _number(folder / "online") == 1
        return discharging and not plugged, min(charges, default=None)


def _zones(folder: Path) -> Iterator[_Thermometer]:
    """The thermal zones that say at which temperatures the machine slows down or switches off."""
    for zone in sorted(folder.glob("thermal_zone*")):
        trips: dict[str, float] = {}
        for kind in zone.glob("trip_point_*_type"):
            value = _number(kind.with_name(kind.name.replace("_type", "_temp")))
            if value is not None and _PLAUSIBLE[0] < value / 1000 < _PLAUSIBLE[1]:
                name = _text(kind)
                trips[name] = min(value / 1000, trips.get(name, _PLAUSIBLE[1]))
        off = trips.get("critical", trips.get("hot"))
        slow = trips.get("passive", None if off is None else off - _MARGIN)
        if slow is not None:
            name = _text(zone / "type") or zone.name
            yield _Thermometer(name, zone / "temp", slow, off if off is not None else slow + _MARGIN)


def _processors(folder: Path) -> Iterator[_Thermometer]:
    """The processors' own sensors, with their limits; 95 degrees where they name none."""
    for chip in sorted(folder.glob("hwmon*")):
        name = _text(chip / "name")
        if name not in ("coretemp", "k10temp", "zenpower"):
            continue
        for file in sorted(chip.glob("temp*_input")):
            slow, off = (_number(file.with_name(file.name.replace("_input", part))) for part in ("_max", "_crit"))
            last = 95.0 if off is None else off / 1000
            first = last - _MARGIN if slow is None else slow / 1000
            yield _Thermometer(name, file, min(first, last - _LAST), last)


class MacSystem:
    """What macOS tells a process: sysctl, the thermal state of NSProcessInfo, and IOKit's power source."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._objc = ctypes.CDLL("/usr/lib/libobjc.dylib")
        self._foundation = ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
        self._power = ctypes.CDLL("/System/Library/Frameworks/IOKit.framework/IOKit")
        self._power.IOPSGetTimeRemainingEstimate.restype = ctypes.c_double
        self._objc.objc_getClass.restype = ctypes.c_void_p
        self._objc.sel_registerName.restype = ctypes.c_void_p

    def sysctl(self, name: str) -> str | int | None:
        """A value by its name, such as hw.perflevel0.physicalcpu; None where there is none."""
        size = ctypes.c_size_t(0)
        if self._libc.sysctlbyname(name.encode(), None, ctypes.byref(size), None, 0) != 0:
            return None
        buffer = ctypes.create_string_buffer(size.value)
        if self._libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0) != 0:
            return None
        raw = buffer.raw[: size.value]
        text = name.endswith(("brand_string", ".model"))
        return raw.rstrip(b"\0").decode(errors="replace") if text else int.from_bytes(raw, sys.byteorder)

    def thermal_state(self) -> int:
        """0 nominal, 1 fair, 2 serious, 3 critical."""
        return int(self._process_info("thermalState", ctypes.c_long))

    def low_power_mode(self) -> bool:
        """Whether the user has switched it on."""
        return bool(self._process_info("isLowPowerModeEnabled", ctypes.c_bool))

    def seconds_of_battery(self) -> float | None:
        """How long the battery will last, -1 while that is unknown; None on mains."""
        seconds = float(self._power.IOPSGetTimeRemainingEstimate())
        return None if seconds == -2.0 else seconds

    def _process_info(self, name: str, kind: Any) -> Any:
        info = self._send(self._objc.objc_getClass(b"NSProcessInfo"), "processInfo", ctypes.c_void_p)
        return self._send(info, name, kind)

    def _send(self, receiver: Any, name: str, kind: Any) -> Any:
        send = ctypes.CFUNCTYPE(kind, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", self._objc))
        return send(receiver, self._objc.sel_registerName(name.encode()))


class MacSensors:
    """A Mac's conditions. system: what tells them, one of this machine's own by default."""

    names: tuple[str, ...] = ("thermal state",)

    def __init__(self, system: MacSystem | None = None) -> None:
        self._system = MacSystem() if system is None else system
        self.has_battery = "Book" in str(self._system.sysctl("hw.model") or "")

    def read(self) -> Conditions:
        """The present conditions."""
        system = self._system
        heat = Heat(min(max(system.thermal_state(), 0), 3))
        on_battery = self.has_battery and system.seconds_of_battery() is not None
        return Conditions(heat, on_battery, saving=system.low_power_mode())


def machine_sensors() -> Sensors:
    """What reads this machine's conditions."""
    if sys.platform == "darwin":
        return MacSensors()
    return LinuxSensors() if sys.platform.startswith("linux") else NoSensors()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None
