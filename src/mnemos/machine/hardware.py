"""What this machine is made of, as far as it matters to inference."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mnemos.machine.levels import cpu_name
from mnemos.machine.memory import machine_memory
from mnemos.machine.sensors import MacSystem, NoSensors, Sensors, machine_sensors
from mnemos.native import core

_NO_LIMIT = 1 << 60  # bytes; what version 1 of control groups says instead of "max" is above
_LARGE_CORE = 0.75  # of the largest capacity: with less, a core is an efficiency core


@dataclass(frozen=True)
class CgroupLimits:
    """What the process's control groups allow it: cores' worth of CPU time, bytes of memory; None without a limit."""

    cores: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Hardware:
    """A machine.

    usable_cores       those that this process may use, by its affinity and its cgroup's quota
    physical_cores     without hyper-threading; 0 if unknown
    performance_cores  logical ones; all of them where they are equal
    caches             bytes of all caches of a level together: "L1d", "L1i", "L2", "L3"
    memory             bytes that this process may use, of the machine's, its cgroup's and its own limit; 0 if unknown
    instruction_sets   that the native kernels can use here, the lowest first
    thermal_sensors    names of the sensors that say when the machine is too warm
    neural_engine      whether there is Apple's
    """

    chip: str
    architecture: str
    logical_cores: int
    physical_cores: int
    performance_cores: int
    efficiency_cores: int
    usable_cores: int
    caches: Mapping[str, int]
    memory: int
    instruction_sets: tuple[str, ...]
    thermal_sensors: tuple[str, ...]
    battery: bool
    cgroup: CgroupLimits
    neural_engine: bool

    def __str__(self) -> str:
        kinds = f"{self.performance_cores} performance and {self.efficiency_cores} efficiency cores"
        if not self.efficiency_cores:
            kinds = f"{self.logical_cores} core{'' if self.logical_cores == 1 else 's'}"
        caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in self.caches.items()) or "unknown"
        limits = [] if self.cgroup.cores is None else [f"{self.cgroup.cores:g} cores"]
        limits += [] if self.cgroup.memory is None else [f"{self.cgroup.memory / 2**30:.1f} GiB"]
        return "\n".join(
            (
                f"{self.chip} ({self.architecture}): {kinds}, of which this process may use {self.usable_cores}",
                f"caches: {caches}; memory: {self.memory / 2**30:.1f} GiB; cgroup: {', '.join(limits) or 'no limit'}",
                f"instruction sets: {', '.join(self.instruction_sets) or 'no native core'}",
                f"thermal sensors: {', '.join(self.thermal_sensors) or 'none'}; "
                f"battery: {'yes' if self.battery else 'no'}; neural engine: {'yes' if self.neural_engine else 'no'}",
            )
        )


def detect(sensors: Sensors | None = None, root: Path = Path("/"), mac: MacSystem | None = None) -> Hardware:
    """This machine. sensors: by default its own. root: where Linux's `sys` and `proc` are. mac: by default its own."""
    if sensors is None:
        sensors = machine_sensors()
    if mac is None and sys.platform == "darwin":
        mac = MacSystem()
    cgroup = CgroupLimits() if mac is not None else cgroup_limits(root)
    if mac is not None:
        chip, logical, physical, (large, small), caches = _mac_processor(mac)
    else:
        chip, logical, physical, (large, small), caches = _linux_processor(root)
    usable = min(logical, core.usable_cores() if core is not None else len(_affinity()) or logical)
    if cgroup.cores is not None:
        usable = max(1, min(usable, -int(-cgroup.cores // 1)))
    memory = machine_memory()
    return Hardware(
        chip=chip,
        architecture=platform.machine(),
        logical_cores=logical,
        physical_cores=physical,
        performance_cores=large,
        efficiency_cores=small,
        usable_cores=usable,
        caches=caches,
        memory=min(memory, cgroup.memory) if memory and cgroup.memory else memory,
        instruction_sets=() if core is None else tuple(core.available_isas()),
        thermal_sensors=() if isinstance(sensors, NoSensors) else sensors.names,
        battery=sensors.has_battery,
        cgroup=cgroup,
        neural_engine=mac is not None and "Apple" in chip,
    )


_Processor = tuple[str, int, int, tuple[int, int], dict[str, int]]  # chip, logical, physical, (large, small), caches


def _mac_processor(mac: MacSystem) -> _Processor:
    def number(name: str) -> int:
        value = mac.sysctl(name)
        return value if isinstance(value, int) else 0

    logical = number("hw.logicalcpu") or os.cpu_count() or 1
    levels = [(number(f"hw.perflevel{level}.logicalcpu"), f"hw.perflevel{level}") for level in range(2)]
    large, small = levels[0][0] or logical, levels[1][0]
    caches = {}
    for name, key in (("L1d", "l1dcachesize"), ("L1i", "l1icachesize")):
        caches[name] = sum(number(f"{level}.{key}") * cores for cores, level in levels)
    caches["L2"] = sum(
        number(f"{level}.l2cachesize") * max(1, cores // max(1, number(f"{level}.cpusperl2")))
        for cores, level in levels
        if cores
    )
    chip = str(mac.sysctl("machdep.cpu.brand_string") or platform.processor())
    return chip, logical, number("hw.physicalcpu"), (large, small), {name: n for name, n in caches.items() if n}


def _linux_processor(root: Path) -> _Processor:
    folder = root / "sys" / "devices" / "system" / "cpu"
    cpus = sorted(path for path in folder.glob("cpu[0-9]*") if path.name[3:].isdigit())
    logical = len(cpus) or os.cpu_count() or 1
    topologies = [cpu / "topology" for cpu in cpus]
    cores = {(_read(one / "physical_package_id"), _read(one / "core_id")) for one in topologies if one.is_dir()}
    return cpu_name(), logical, len(cores), _linux_kinds(root, cpus, logical), _linux_caches(cpus)


def _linux_kinds(root: Path, cpus: list[Path], logical: int) -> tuple[int, int]:
    """(performance cores, efficiency cores): as Intel's hybrid processors list them, else by Arm's capacities."""
    devices = root / "sys" / "devices"
    small = len(_cpu_list(_read(devices / "cpu_atom" / "cpus")))
    if small:
        return len(_cpu_list(_read(devices / "cpu_core" / "cpus"))), small
    capacities = [int(text) for cpu in cpus if (text := _read(cpu / "cpu_capacity")).isdigit()]
    small = sum(capacity < _LARGE_CORE * max(capacities) for capacity in capacities)
    return logical - small, small


def _linux_caches(cpus: list[Path]) -> dict[str, int]:
    found: dict[tuple[str, str], int] = {}
    for cpu in cpus:
        for index in sorted((cpu / "cache").glob("index*")):
            level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
            if size[:-1].isdigit():
                name = f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")
                unit = {"K": 2**10, "M": 2**20}.get(size[-1], 1)
                found[name, _read(index / "shared_cpu_list") or cpu.name] = int(size[:-1]) * unit
    sizes: dict[str, int] = {}
    for (name, _), size_in_bytes in sorted(found.items()):
        sizes[name] = sizes.get(name, 0) + size_in_bytes
    return sizes


def cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """The tightest limits of the process's own control groups and those above them, of either version.

    root: of the system.
    """
    mount = root / "sys" / "fs" / "cgroup"
    cores: list[float] = []
    memory: list[int] = []
    for line in _read(root / "proc" / "self" / "cgroup").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        first = controllers.partition(",")[0]  # version 1 has a hierarchy for each
        for group in _groups(mount / first, path):
            quota, _, period = _read(group / "cpu.max").partition(" ")
            if "cpu" in controllers.split(","):
                quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):
                cores.append(int(quota) / int(period))
            most = _read(group / ("memory.limit_in_bytes" if controllers == "memory" else "memory.max"))
            memory += [int(most)] if most.isdigit() and int(most) < _NO_LIMIT else []
    return CgroupLimits(min(cores, default=None), min(memory, default=None))


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """A group and all above it, up to the mount point."""
    group = mount / path.lstrip("/")
    yield group
    while group != mount:
        group = group.parent
        yield group


def _cpu_list(text: str) -> list[int]:
    """The numbers of a list like 0-3,8."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
