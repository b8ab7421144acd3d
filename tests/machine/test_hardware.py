"""What a machine is made of, read from simulated files and a simulated macOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemos.machine.hardware import CgroupLimits, cgroup_limits, detect
from mnemos.machine.sensors import MacSensors, NoSensors
from tests.machine.test_sensors import FakeMac, put

CPUS = "sys/devices/system/cpu"


def test_this_machine() -> None:
    hardware = detect()
    assert 1 <= hardware.usable_cores <= hardware.logical_cores
    assert hardware.performance_cores + hardware.efficiency_cores == hardware.logical_cores
    assert hardware.memory > 2**28
    assert "scalar" in hardware.instruction_sets
    assert hardware.chip in str(hardware)


def laptop(root: Path) -> None:
    for cpu in range(8):
        folder = f"{CPUS}/cpu{cpu}"
        put(root, {f"{folder}/topology/physical_package_id": 0, f"{folder}/topology/core_id": min(cpu // 2, cpu - 2)})
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "48K", min(cpu // 2, cpu - 2)),
                (2, "Unified", "2M", cpu // 4),
                (3, "Unified", "12288K", "0-7"),
            ]
        ):
            cache = f"{folder}/cache/index{index}"
            put(root, {f"{cache}/level": level, f"{cache}/type": kind, f"{cache}/size": size})
            put(root, {f"{cache}/shared_cpu_list": shared})


def test_hybrid_processor_and_caches(tmp_path: Path) -> None:
    laptop(tmp_path)
    put(tmp_path, {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"})
    hardware = detect(NoSensors(), tmp_path)
    assert (hardware.logical_cores, hardware.performance_cores, hardware.efficiency_cores) == (8, 4, 4)
    assert hardware.caches["L3"] == 12 << 20
    assert hardware.caches["L2"] == 4 << 20
    assert hardware.caches["L1d"] == hardware.physical_cores * (48 << 10)
    assert "4 performance and 4 efficiency cores" in str(hardware)


def test_cores_of_arm_by_their_capacity(tmp_path: Path) -> None:
    put(tmp_path, {f"{CPUS}/cpu{cpu}/cpu_capacity": 1024 if cpu > 5 else 400 for cpu in range(8)})
    hardware = detect(NoSensors(), tmp_path)
    assert (hardware.performance_cores, hardware.efficiency_cores) == (2, 6)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == CgroupLimits()
    put(tmp_path, {"proc/self/cgroup": "0::/kubepods/pod7/box"})
    group = "sys/fs/cgroup/kubepods"
    put(tmp_path, {f"{group}/pod7/box/cpu.max": "max 100000", f"{group}/pod7/cpu.max": "150000 100000"})
    put(tmp_path, {f"{group}/pod7/box/memory.max": 2 << 30, f"{group}/memory.max": "max"})
    assert cgroup_limits(tmp_path) == CgroupLimits(1.5, 2 << 30)
    put(tmp_path, {f"{group}/pod7/memory.max": 1 << 30})
    assert detect(NoSensors(), tmp_path).cgroup == CgroupLimits(1.5, 1 << 30)
    assert detect(NoSensors(), tmp_path).memory <= 1 << 30


def test_limits_of_control_groups_of_the_first_version(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "5:memory:/docker/box\n4:cpu,cpuacct:/docker/box\n1:name=systemd:/docker/box"})
    group = "sys/fs/cgroup"
    put(tmp_path, {f"{group}/memory/docker/box/memory.limit_in_bytes": 3 << 30})
    put(tmp_path, {f"{group}/memory/memory.limit_in_bytes": 9223372036854771712})
    put(tmp_path, {f"{group}/cpu/docker/box/cpu.cfs_quota_us": 250_000})
    put(tmp_path, {f"{group}/cpu/docker/box/cpu.cfs_period_us": 100_000, f"{group}/cpu/cpu.cfs_quota_us": -1})
    assert cgroup_limits(tmp_path) == CgroupLimits(2.5, 3 << 30)


def test_a_macbook() -> None:
    mac: Any = FakeMac("MacBookPro18,3")
    mac.values |= {
        "machdep.cpu.brand_string": "Apple M1 Pro",
        "hw.logicalcpu": 10,
        "hw.physicalcpu": 10,
        "hw.perflevel0.logicalcpu": 8,
        "hw.perflevel1.logicalcpu": 2,
        "hw.perflevel0.l1dcachesize": 131_072,
        "hw.perflevel1.l1dcachesize": 65_536,
        "hw.perflevel0.l2cachesize": 12 << 20,
        "hw.perflevel0.cpusperl2": 4,
        "hw.perflevel1.l2cachesize": 4 << 20,
        "hw.perflevel1.cpusperl2": 2,
    }
    hardware = detect(MacSensors(mac), mac=mac)
    assert (hardware.chip, hardware.performance_cores, hardware.efficiency_cores) == ("Apple M1 Pro", 8, 2)
    assert hardware.caches == {"L1d": 8 * 131_072 + 2 * 65_536, "L2": 28 << 20}
    assert (hardware.battery, hardware.neural_engine) == (True, True)
