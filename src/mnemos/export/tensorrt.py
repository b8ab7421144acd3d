"""TensorRT: an ONNX file checked for it, and the command that builds the engine on the machine with the GPU."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mnemos.errors import ConfigError, ModelError, shown
from mnemos.export.example import PAST, SUM, Example
from mnemos.export.exporter import TOLERANCE
from mnemos.export.messages import first_line
from mnemos.export.onnx import ONNXExporter
from mnemos.export.requirements import imported

Sizes = tuple[int, int, int]  # the smallest, the one to be fastest at, the largest
_BATCH: Sizes = (1, 1, 8)
_OTHER: Sizes = (1, 128, 512)
_PAST: Sizes = (0, 128, 512)
_POINTS = ("min", "opt", "max")


class TensorRTExporter(ONNXExporter):
    """Exports a module to ONNX for TensorRT, with NAME.trtexec.sh beside it, which builds the engine NAME.plan.

    exporter = TensorRTExporter(model, sizes={"batch": (1, 4, 16), "sequence": (1, 256, 1024)})
    exporter.export("model.onnx", torch.randint(0, 100, (1, 10)))

    An engine belongs to one kind of GPU and one version of TensorRT, and is built there. The file is compared in ONNX
    Runtime, and ONNX's own checker infers every shape in it; the engine is not compared, which the report says.
    """

    format = "ONNX file for TensorRT"

    def __init__(
        self, model: nn.Module, tolerance: float = TOLERANCE, sizes: Mapping[str, Sizes] | None = None
    ) -> None:
        """sizes: the smallest, usual and largest size of an axis by its name, for the engine's profile.

        Unless they are given, a batch has 1, 1 and 8 rows, a cache 0, 128 and 512 positions, another axis 1, 128, 512.
        """
        super().__init__(model, tolerance)
        for name, given in (sizes or {}).items():
            if (
                len(given) != 3
                or any(type(size) is not int for size in given)
                or not 0 <= given[0] <= given[1] <= given[2]
            ):
                raise ConfigError(
                    f"sizes has {shown(given)} for {name}; expected its smallest, usual and largest size, as (1, 4, 16)"
                )
        self._sizes = dict(sizes or {})

    def _write(
        self, made: Path, example: Example, outputs: tuple[str, ...], opset: int, bits: int | None,
        rounded: dict[str, Any],
    ) -> list[str]:  # fmt: skip
        unknown = [name for name in self._sizes if name not in example.axis_names]
        if unknown:
            raise ConfigError(f"sizes has {unknown[0]!r}; expected some of {', '.join(example.axis_names)}")
        if bits is not None:
            raise ConfigError(f"bits is {bits}; TensorRT has no operator for such weights: leave it out")
        notes = super()._write(made, example, outputs, opset, bits, rounded)
        taken = _checked(made)
        script = made.with_suffix(".trtexec.sh")
        script.write_text(self._script(made, example, taken), encoding="utf-8")
        script.chmod(0o755)
        return [*notes, f"no engine was built: run {script.name} where TensorRT and its GPU are"]

    def _script(self, made: Path, example: Example, taken: list[str]) -> str:
        options = [f"--onnx={made.name}", f"--saveEngine={made.with_suffix('.plan').name}", "--skipInference"]
        labels = {example.names[name]: name for name in example.tensors}
        varying = [name for name in taken if example.axes.get(labels[name])]
        for index, point in enumerate(_POINTS if varying else ()):
            shapes = (f"{name}:{self._shape(example, labels[name], index)}" for name in varying)
            options.append(f"--{point}Shapes={','.join(shapes)}")
        command = " \\\n  ".join(shlex.quote(option) for option in options)
        return (
            "#!/bin/sh\n# Builds TensorRT's engine for the GPU of this machine. More options of trtexec may follow,\n"
            "# such as --fp16 up to TensorRT 10; from 11 on the types are those of the file.\n"
            f'cd "$(dirname "$0")" && exec trtexec \\\n  {command} \\\n  "$@"\n'
        )

    def _shape(self, example: Example, name: str, point: int) -> str:
        axes = example.axes[name]
        sizes = [
            sum(self._size(example, part, point) for part in axes[axis].split(SUM)) if axis in axes else size
            for axis, size in enumerate(example.tensors[name].shape)
        ]
        return "x".join(str(size) for size in sizes)

    def _size(self, example: Example, axis: str, point: int) -> int:
        batches = {axes[0] for axes in example.axes.values() if 0 in axes}
        usual = _PAST if axis == PAST else _BATCH if axis in batches else _OTHER
        return self._sizes.get(axis, usual)[point]


def _checked(path: Path) -> list[str]:
    """The inputs that a file takes. ModelError: ONNX's checker, or its inference of shapes, refuses it."""
    onnx = imported("onnx", "export", "exporting for TensorRT")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        found = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)
    except Exception as error:
        raise ModelError(f"the file does not pass ONNX's checks: {first_line(error)}") from error
    return [each.name for each in found.graph.input]
