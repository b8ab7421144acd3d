"""`.pt2` files: programs of torch.export, and machine code of AOTInductor."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemos.errors import FormatError
from mnemos.export.comparison import LARGEST, Run
from mnemos.export.example import Example, answer_of, arrays_of, example_of
from mnemos.export.exporter import ExportReport, FlatOutputs, ModelExporter, outputs_of
from mnemos.export.messages import first_line
from mnemos.export.recurrent import scanned
from mnemos.formats.whole_file import late_errors


class ProgramExporter(ModelExporter):
    """Exports a module as a program of torch.export (`.pt2`), which PyTorch runs without the module's source.

    compile: as machine code for this kind of CPU, by AOTInductor; this takes a C++ compiler and a minute or two.
    """

    format = "torch.export program"

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        dynamic_axes: Mapping[str, Any] | None = None,
        compile: bool = False,
    ) -> ExportReport:
        """Writes the file. The arguments are those of `ONNXExporter.export`.

        ModelError: torch.export cannot express the module (it names branches on data), or the results differ.
        """
        example = example_of(self.model, dummy_input, None, None, dynamic_axes)
        outputs = len(outputs_of(self.model, example, None))
        return self._export(
            path,
            example,
            outputs,
            lambda made: self._write(made, example, outputs, compile),
            lambda made: running(load_program(made)),
            {"torch": torch.__version__, "code": "AOTInductor" if compile else "none"},
        )

    def load_program(self, path: str | os.PathLike[str]) -> Any:
        """The program of a file, callable like the module."""
        return load_program(path)

    def _write(self, made: Path, example: Example, outputs: int, compile: bool) -> list[str]:
        program = exported_program(self.model, example, outputs, scans=not compile)
        if not compile:
            self._allow_whole_tables(program, example)
            with made.open("wb") as file, late_errors(file) as patient:
                torch.export.save(program, patient)
            return []
        target = made if made.suffix == ".pt2" else made.with_suffix(".pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(target.absolute()))
        if target != made:
            os.replace(target, made)
        return ["machine code for this kind of CPU"]

    def _allow_whole_tables(self, program: torch.export.ExportedProgram, example: Example) -> None:
        """Takes back the guards `size != N` beside `size <= N`, where the program is right at size N.

        All of a table is laid out otherwise than a part of it, which torch.export takes for another way of the module.
        """
        guards: list[str] = getattr(program, "_guards_code", [])
        for guard in list(guards):
            found = _NOT_WHOLE.fullmatch(guard)
            if found is None or guard.replace("!=", "<=") not in guards:
                continue
            name, axis, size = list(example.tensors)[int(found[1])], int(found[2]), int(found[3])
            label = example.axes.get(name, {}).get(axis)
            if label not in example.axis_names:  # a sum of two axes
                continue
            program._guards_code = [one for one in program._guards_code if one != guard]
            if not self._same(program, example, dict.fromkeys(example.axis_names, 2) | {label: size}):
                program._guards_code = [*program._guards_code, guard]

    def _same(self, program: torch.export.ExportedProgram, example: Example, sizes: Mapping[str, int]) -> bool:
        try:
            tensors = example.values(sizes, "random", 0)
            expected = [tensor.numpy() for _, tensor in answer_of(self.model, tensors)]
            found = running(program.module())(tensors)
        except Exception:  # of sizes that do not go together
            return False
        pairs = zip(found, expected, strict=False)
        return all(h.shape == w.shape and LARGEST.of(h, w) <= self.tolerance for h, w in pairs)


# A guard of torch.export: this axis of this input has another size.
_NOT_WHOLE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\] != (\d+)")


def exported_program(
    module: torch.nn.Module,
    example: Example,
    outputs: int,
    longest: Mapping[str, int] | None = None,
    scans: bool = True,
) -> torch.export.ExportedProgram:
    """The module as a torch.export program that takes the example's tensors in order; the varying axes are dynamic.

    longest: the largest size of axes that have a limit, by name; scans: recurrent layers become scans, of any length,
    where the next converter knows them; otherwise they are unrolled.
    """
    wrapper = FlatOutputs(module, tuple(example.tensors), outputs).eval()
    dynamic: Any = torch.export.Dim.DYNAMIC
    limited = {label: dynamic(min=1, max=most) for label, most in (longest or {}).items()}
    shapes = tuple(
        {axis: limited.get(label, dynamic) for axis, label in example.axes.get(name, {}).items()} or None
        for name in example.tensors
    )
    with scanned(module) if scans else nullcontext():
        return torch.export.export(
            wrapper,
            tuple(example.traced().tensors.values()),
            dynamic_shapes=(shapes,) if example.axes else None,
            strict=False,
        )


def load_program(path: str | os.PathLike[str]) -> Any:
    """The module or the machine code of a `.pt2` file, callable. FormatError: it is none."""
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file; expected a .pt2 file")
    try:
        with zipfile.ZipFile(path) as file:
            compiled = any("/aotinductor/" in name for name in file.namelist())
        return _load_compiled(Path(path)) if compiled else torch.export.load(os.fspath(path)).module()
    except Exception as error:
        raise FormatError(f"{path}: not a program of torch.export: {first_line(error)}") from error


def _load_compiled(path: Path) -> Any:
    return torch._inductor.aoti_load_package(str(path))


def running(program: Any) -> Run:
    """The results of what takes a module's tensors in order."""

    def run(tensors: Mapping[str, Tensor]) -> list[Any]:
        with torch.no_grad():
            return arrays_of(program(*tensors.values()))

    return run
