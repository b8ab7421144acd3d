"""An engine set up for the machine, by the names of research code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mnemos.engine.options import EngineOptions
from mnemos.errors import ConfigError, UnsupportedError, shown
from mnemos.machine.hardware import Hardware, detect
from mnemos.machine.performance import Allowance, allowance_for
from mnemos.machine.sensors import Conditions, Sensors, machine_sensors
from mnemos.rules import FLAG, hint

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine

_KEYS = ("use_neural_engine", "max_memory_gb", "thermal_throttle", "performance_mode")


class HardwareOptimizer:
    """Finds out what the machine is made of and has an engine use it accordingly, from its creation on.

    engine           the engine; without one, `options` are those to make one with
    hardware_config  performance_mode ("balanced"), thermal_throttle (True), max_memory_gb and use_neural_engine
    sensors          by default the machine's
    """

    def __init__(
        self,
        engine: InferenceEngine | None = None,
        hardware_config: Mapping[str, Any] | None = None,
        *,
        sensors: Sensors | None = None,
    ) -> None:
        self._engine = engine
        self._sensors = machine_sensors() if sensors is None else sensors
        self.hardware = self.detect_hardware()
        given = hardware_options(hardware_config or {}, self.hardware)
        self.options: dict[str, Any] = {"performance_mode": "balanced", "thermal_throttle": True, **given}
        self.allowance = self.optimize_for_hardware()

    def detect_hardware(self) -> Hardware:
        """Chip, cores, caches, memory, instruction sets, sensors, battery and limits of this machine."""
        return detect(self._sensors)

    def optimize_for_hardware(self, mode: str | None = None) -> Allowance:
        """Chooses performance, balanced or efficiency, for the engine too; returns what that allows on a cool machine.

        mode: by default the one chosen last. ConfigError for another name.
        """
        mode = self.options["performance_mode"] if mode is None else mode
        engine = self._engine
        if engine is None:
            self.allowance = allowance_for(mode, self.hardware, _most_by_default(self.hardware))
        else:
            pacer = engine.pace(
                mode,
                self.options["thermal_throttle"],
                max_memory_gb=self.options.get("max_memory_gb"),
                sensors=self._sensors,
            )
            self.allowance = pacer.governor.base
        self.options["performance_mode"] = mode
        return self.allowance

    def conditions(self) -> Conditions:
        """The machine's heat, power and battery at the moment."""
        return self._sensors.read()


class MacBookOptimizer(HardwareOptimizer):
    """`HardwareOptimizer`, by its name in the documents of MLoT-Spark; it works on other machines too."""


def hardware_options(config: Mapping[str, Any], hardware: Hardware | None = None) -> dict[str, Any]:
    """Options of an engine for these settings of its hardware. hardware: by default this machine.

    ConfigError for an unknown key or a value that is not allowed; UnsupportedError for the Neural Engine, which does
    not run these models, and which most machines don't have.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"hardware_config is {shown(config)}; it must be a mapping of {', '.join(_KEYS)}")
    options = dict(config)
    for name in options:
        if name not in _KEYS:
            raise ConfigError(f"{name} is not a setting of the hardware; {hint(name, _KEYS, 'the settings')}")
    if FLAG.apply("use_neural_engine", options.pop("use_neural_engine", False)):
        found = detect() if hardware is None else hardware
        reason = (
            "models run on the processor's cores, and its Neural Engine runs models that were exported for Core ML only"
            if found.neural_engine
            else f"this machine ({found.chip}) has no Neural Engine"
        )
        raise UnsupportedError(f"use_neural_engine is True: {reason}; set it to False")
    EngineOptions(**options)
    return options


def _most_by_default(hardware: Hardware) -> Allowance:
    default = EngineOptions()
    return Allowance(hardware.usable_cores, default.max_sequences, default.max_batch_tokens)
