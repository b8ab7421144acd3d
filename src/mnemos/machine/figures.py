"""The machine that figures were measured on, and what bounds them: its bandwidth and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mnemos.errors import UnsupportedError
from mnemos.machine.levels import cpu_name, describe_levels, levels_in_use
from mnemos.native import require_core

_REPEATS = 12


@dataclass(frozen=True)
class Limits:
    """What all usable cores reach together. bandwidth: bytes/s of reading.

    rates: multiply-adds/s of the native kernels by the form of a product's inputs: "float32", "int8" and, where there
    are dot products for it, "bfloat16".
    """

    bandwidth: float
    rates: Mapping[str, float]


@dataclass(frozen=True)
class Machine:
    """cores: how many this process may use; isa: what the native kernels use, by operators where these differ."""

    cpu: str
    cores: int
    isa: str
    limits: Limits

    def __str__(self) -> str:
        rates = ", ".join(f"{2 * rate / 1e9:.0f} in {form}" for form, rate in self.limits.rates.items())
        return (
            f"{self.cpu}, {self.cores} core{'' if self.cores == 1 else 's'}, {self.isa}\n"
            f"reads {self.limits.bandwidth / 1e9:.1f} GB/s, multiplies and adds at {rates} (GFLOP/s)"
        )


def examine(size: int) -> Machine:
    """The machine, with its read bandwidth over `size` bytes, such as those of a model's weights, or over 16 MiB.

    Of less, waking the threads would be most of what is measured.
    """
    bandwidth = read_bandwidth(max(size, 16 << 20))
    return Machine(
        cpu_name(), usable_cores(), instruction_set(), Limits(bandwidth, best_rates(levels_in_use().values()))
    )


def usable_cores() -> int:
    """As the native core counts them: of the affinity mask, within the cgroup's quota."""
    return int(require_core().usable_cores())


def instruction_set() -> str:
    """What the native kernels use here: a level, or one for each class of operators where these differ."""
    return describe_levels(levels_in_use())


def read_bandwidth(size: int) -> float:
    """Bytes per second that all usable cores together read in sequence from `size` bytes; the best of some runs."""
    native = require_core()
    return float(native.read_bandwidth(native.shared_pool(0), size, _REPEATS))


def best_rates(levels: Iterable[str]) -> dict[str, float]:
    """The best rates of some levels, by form."""
    best: dict[str, float] = {}
    for level in sorted(set(levels)):
        for form, rate in multiply_rates(level).items():
            best[form] = max(rate, best.get(form, 0.0))
    return best


def multiply_rates(isa: str) -> dict[str, float]:
    """Multiply-adds per second of this level's native kernels by the form of their inputs, from registers alone."""
    native = require_core()
    rates = {}
    for form in ("float32", "bfloat16", "int8"):
        try:
            rates[form] = float(native.multiply_rate(native.shared_pool(0), isa, form, _REPEATS))
        except UnsupportedError:
            continue  # the level has no dot products of this form
    return rates
