"""What became of a module's layers, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer or parameter.

    form: "int8", "int5", "int4" or the dtype that it keeps; bytes: in a file; error: the norm of the weights' change
    over their own norm, None where nothing changed; reason: why this form, empty where it is the one asked for; values:
    how many there are, 0 where another row counts them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    form: str
    bytes: int
    error: float | None
    reason: str
    values: int


class Report:
    """The rows of a table, which `str` gives.

    bytes: of the file, without its header; parameters: how many there are.
    """

    def __init__(self, rows: Sequence[LayerReport]) -> None:
        self.rows = tuple(rows)
        self.bytes = sum(row.bytes for row in rows)
        self.parameters = sum(row.values for row in rows)

    @property
    def share(self) -> float:
        """The file's bytes over what the same parameters take in float32."""
        return float(self.bytes / max(1, 4 * self.parameters))

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "form", "bytes", "error", "remark")
        cells = [
            (
                row.name, row.kind, " x ".join(map(str, row.shape)), row.form, f"{row.bytes:,}",
                "" if row.error is None else f"{row.error:.4f}", row.reason,
            )
            for row in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *cells)
        ]
        total = f"{self.parameters:,} parameters in {self.bytes:,} bytes, {self.share:.3f} of float32"
        return "\n".join([*(line.rstrip() for line in lines), total])
