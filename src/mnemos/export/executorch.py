"""ExecuTorch: PyTorch's runtime for phones and small devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mnemos.errors import ConfigError
from mnemos.export.exporter import ExportReport, outputs_of, refuse_bfloat16
from mnemos.export.foreign import Arrays, ForeignExporter, ForeignModel, ForeignProcess, checked_length, one_row
from mnemos.export.programs import exported_program

PACKAGES = ("torch", "executorch", "torchao")
LENGTH = 128
_TRIED = (5, 2, 17, 11)  # lengths, beside 1 and the longest


class ExecuTorchExporter(ForeignExporter):
    """Exports a module to ExecuTorch (`.pte`), with the kernels of XNNPACK.

    exporter = ExecuTorchExporter(model)
    exporter.export("model.pte", torch.randint(0, 100, (1, 10)), max_length=512)
    with exporter.load_executorch("model.pte") as file:
        logits = file(ids)["output_0"]
    """

    format = "ExecuTorch file"
    runtime, title = "executorch", "ExecuTorch"
    packages = PACKAGES

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        dynamic_axes: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> ExportReport:
        """Writes the file. The length varies; the batch is that of dummy_input (None: one row of token ids).

        dynamic_axes: what varies instead, as for `ONNXExporter.export`. max_length: the largest size of what varies,
        for which the runtime reserves memory; None: 128, or the most that the module takes.
        ConfigError: an argument that does not fit; MissingDependencyError: no environment has ExecuTorch; ModelError:
        it cannot express the module, or the results differ.
        """
        checked_length(max_length)
        refuse_bfloat16(self.model, "its answers cannot be compared here")
        example = one_row(self.model, dummy_input, None, None, dynamic_axes)
        sizes, _, _ = next(example.others())
        if sizes and max(sizes.values()) > (max_length or LENGTH):
            raise ConfigError(
                f"max_length is {max_length or LENGTH}; expected at least dummy_input's {max(sizes.values())}"
            )
        most = self._longest(example, max_length, LENGTH)
        tried = (1, most, *(size for size in _TRIED if size < most))
        example = replace(example, only=dict.fromkeys(example.axis_names, tried))
        outputs = outputs_of(self.model, example, None)
        longest = dict.fromkeys(example.axis_names, most)
        return self._through_process(
            path,
            example,
            outputs,
            lambda: {"program": exported_program(self.model, example, len(outputs), longest)},
            {},
            ExecuTorchFile,
            _arguments,
        )

    def load_executorch(self, path: str | os.PathLike[str]) -> ExecuTorchFile:
        """A file, to be called. FormatError: it is none of ExecuTorch's."""
        return load_executorch(path, self._make_environment)


class ExecuTorchFile(ForeignModel):
    """A `.pte` file. Its inputs have no names; its results are output_0, output_1, ..."""

    def checked(self, arrays: Arrays) -> Arrays:
        largest, types = self.about["largest"], self.about["types"]
        if len(arrays) != len(largest):
            raise ConfigError(f"{len(arrays)} inputs are given; the file takes {len(largest)}")
        for (name, array), sizes, type in zip(arrays.items(), largest, types, strict=True):
            if array.dtype.name != type:
                raise ConfigError(f"{name} is of type {array.dtype.name}; the file takes {type}")
            if array.ndim != len(sizes) or any(size > most for size, most in zip(array.shape, sizes, strict=False)):
                raise ConfigError(f"{name} has the shape {array.shape}; the file takes up to {tuple(sizes)}")
        return arrays


def load_executorch(path: str | os.PathLike[str], make_environment: bool = False) -> ExecuTorchFile:
    """A file, to be called. FormatError: it is none of ExecuTorch's; MissingDependencyError: nothing here runs it."""
    return ExecuTorchFile(ForeignProcess("executorch", PACKAGES, make_environment), Path(path))


def _arguments(tensors: Mapping[str, Tensor]) -> Arrays:
    return {f"input_{index}": tensor.numpy() for index, tensor in enumerate(tensors.values())}
