"""The machine that figures were measured on, and the bandwidth that bounds them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

_REPEATS = 12


@dataclass(frozen=True)
class Machine:
    """cores: how many this process may use; isa: what the native kernels use; bandwidth: bytes/s of reading."""

    cpu: str
    cores: int
    isa: str
    bandwidth: float


def examine(size: int) -> Machine:
    """The machine, with its read bandwidth over `size` bytes, such as those of a model's weights."""
    return Machine(cpu_name(), usable_cores(), instruction_set(), read_bandwidth(size))


def usable_cores() -> int:
    """As the native core counts them: of the affinity mask, within the cgroup's quota."""
    return int(import_module("mnemos._native").usable_cores())


def cpu_name() -> str:
    """As the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def instruction_set() -> str:
    """The instruction set that the native kernels run with here."""
    return str(import_module("mnemos._native").isa())


def read_bandwidth(size: int) -> float:
    """Bytes per second that all usable cores together read in sequence from `size` bytes; the best of some runs."""
    native = import_module("mnemos._native")
    return float(native.read_bandwidth(native.shared_pool(0), size, _REPEATS))
