"""What an export says of its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

OF_LARGEST = "the largest value"  # what an error is a part of, if nothing else is said


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    bytes: of the file and those of the same name; parameter_bytes: of the module's own, shared ones once; error: the
    largest difference, as a part of `unit`, None where nothing here runs the file; speed: times as fast as PyTorch, by
    the size of the input; versions: of what wrote and ran it; notes: what a reader should know.
    """

    format: str
    path: Path
    bytes: int
    parameter_bytes: int
    error: float | None
    shapes: tuple[str, ...]
    inputs: int
    versions: dict[str, str]
    speed: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unit: str = OF_LARGEST

    def __str__(self) -> str:
        rows = [
            ("file", f"{self.path}"),
            ("format", self.format + "".join(f", {name} {version}" for name, version in self.versions.items())),
            ("size", f"{self.bytes / 1e6:.2f} MB, {self.bytes / max(1, self.parameter_bytes):.2f} x the parameters"),
        ]
        if self.error is not None:
            tried = f"over {self.inputs} inputs: {'; '.join(self.shapes)}"
            rows.append(("error", f"{self.error:.1e} of {self.unit}, {tried}"))
        if self.speed:
            ratios = ", ".join(f"{ratio:.2f} x at {size}" for size, ratio in self.speed.items())
            rows.append(("speed", f"PyTorch's {ratios}"))
        rows += [("note", note) for note in self.notes]
        return "\n".join(f"{name:<8}{value}" for name, value in rows)
