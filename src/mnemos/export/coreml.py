"""Core ML: Apple's runtime for its CPUs, GPUs and neural engines."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError, ModelError, UnsupportedError
from mnemos.export.exporter import ExportReport, outputs_of, refuse_bfloat16
from mnemos.export.foreign import (
    Arrays,
    ForeignExporter,
    ForeignModel,
    ForeignProcess,
    Programs,
    checked_length,
    one_row,
)
from mnemos.export.programs import exported_program
from mnemos.export.recurrent import is_recurrent
from mnemos.export.torchscript import traced_module

PACKAGES = ("torch", "coremltools", "numpy")
LENGTH = 128
_TRIED = (5, 2, 17, 11)


class CoreMLExporter(ForeignExporter):
    """Exports a module to Core ML (`.mlpackage`, a folder), for iOS 18 and macOS 15 on.

    exporter = CoreMLExporter(model)
    exporter.export("model.mlpackage", torch.randint(0, 100, (1, 10)), max_length=512)

    Only macOS runs such files, and there they are compared like all others. Elsewhere the program that is converted is
    compared with the module, the file is read again and its inputs, their sizes and its outputs are checked; `error` in
    the report is None then, and a note says so.
    """

    format = "Core ML package"
    runtime, title = "coreml", "Core ML"
    packages = PACKAGES
    is_folder = True
    spells_out_norms = True  # coremltools takes no RMSNorm with PyTorch's own epsilon

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        max_length: int | None = None,
        half: bool = False,
    ) -> ExportReport:
        """Writes the folder. Integers are int32 in it; of token ids the length varies from 1 to max_length (None:
        128, or the most that the module takes).

        half: weights and arithmetic in float16, the one type of the neural engine; its difference is larger than the
        tolerance for most models. ConfigError: an argument that does not fit; MissingDependencyError: no environment
        has coremltools; ModelError: it cannot express the module, or something differs.
        """
        if Path(path).suffix != ".mlpackage":
            raise ConfigError(f"path is {os.fspath(path)!r}; expected a name that ends in .mlpackage")
        checked_length(max_length)
        refuse_bfloat16(self.model, "Core ML computes nothing")
        example = one_row(self.model, dummy_input, input_names, output_names, None)
        most = self._longest(example, max_length, LENGTH)
        tried = (1, most, *(size for size in _TRIED if size < most))
        example = replace(example, only=dict.fromkeys(example.axis_names, tried))
        outputs = outputs_of(self.model, example, output_names)
        longest = dict.fromkeys(example.axis_names, most)
        sizes = {
            example.names[name]: [
                [1, most] if axis in example.axes.get(name, {}) else [size, size]
                for axis, size in enumerate(tensor.shape)
            ]
            for name, tensor in example.tensors.items()
        }
        inputs = {
            label: (sizes[label], "float32" if tensor.is_floating_point() else "int32")
            for label, tensor in zip(sizes, example.tensors.values(), strict=True)
        }

        def programs() -> Programs:
            if is_recurrent(self.model):  # Core ML has layers of its own for a trace, and no scan
                return {"trace": traced_module(self.model, example, len(outputs))}
            return {"program": exported_program(self.model, example, len(outputs), longest)}

        return self._through_process(
            path,
            example,
            outputs,
            programs,
            {"inputs": inputs, "outputs": list(outputs), "half": half},
            lambda process, made: _checked(CoreMLFile(process, made), sizes, outputs),
            lambda tensors: {example.names[name]: tensor.numpy() for name, tensor in tensors.items()},
        )

    def load_coreml(self, path: str | os.PathLike[str]) -> CoreMLFile:
        """A package, to be called on macOS, and looked at anywhere. FormatError: it is none of Core ML's."""
        return load_coreml(path, self._make_environment)


class CoreMLFile(ForeignModel):
    """A `.mlpackage`. about: `inputs` with the type and the smallest and largest size of each axis, `outputs`,
    `operators`, and whether it `runs` here."""

    def checked(self, arrays: Arrays) -> Arrays:
        if not self.about["runs"]:
            raise UnsupportedError(f"{self._path}: Core ML runs on macOS; this is {sys.platform}")
        inputs = self.about["inputs"]
        if len(inputs) == 1 and list(arrays) == ["input_0"]:
            arrays = {next(iter(inputs)): arrays["input_0"]}
        if set(arrays) != set(inputs):
            raise ConfigError(f"the inputs are {', '.join(arrays)}; the file takes {', '.join(inputs)}")
        return arrays


def load_coreml(path: str | os.PathLike[str], make_environment: bool = False) -> CoreMLFile:
    """A package. FormatError: it is none of Core ML's; MissingDependencyError: nothing here reads it."""
    return CoreMLFile(ForeignProcess("coreml", PACKAGES, make_environment), Path(path))


def _checked(file: CoreMLFile, expected: dict[str, list[list[int]]], outputs: tuple[str, ...]) -> CoreMLFile:
    """ModelError: the file's description is not what was asked for."""
    found = {name: each["sizes"] for name, each in file.about["inputs"].items()}
    if found != expected or file.about["outputs"] != list(outputs):
        raise ModelError(
            f"Core ML's file takes {found} and returns {file.about['outputs']}; expected {expected} and {list(outputs)}"
        )
    return file
