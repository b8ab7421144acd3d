"""TorchScript: for C++ programs and whatever loads with `torch.jit.load`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mnemos.errors import ConfigError, FormatError, shown
from mnemos.export.comparison import Run
from mnemos.export.example import Example, arrays_of, example_of
from mnemos.export.exporter import ExportReport, FlatOutputs, ModelExporter, outputs_of
from mnemos.export.messages import first_line
from mnemos.export.tracing import without_gradients

METHODS = ("trace", "script")


class TorchScriptExporter(ModelExporter):
    """Exports a module to TorchScript, by recording a call (`trace`) or by compiling its source (`script`).

        exporter = TorchScriptExporter(model)
        exporter.export("model.pt", torch.randint(0, 100, (1, 10)), method="trace")
        model = exporter.load_torchscript("model.pt")

    PyTorch develops TorchScript no further; `ProgramExporter` writes its successor.
    """

    format = "TorchScript file"
    through_program = False

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        method: Literal["trace", "script"] = "trace",
        dynamic_axes: Mapping[str, Any] | None = None,
    ) -> ExportReport:
        """Writes the file.

        dummy_input: as of `ONNXExporter.export`; script needs it only for the comparison. dynamic_axes: what varies in
        the comparison. ConfigError: an argument that does not fit; ModelError: the module cannot be expressed, or
        tracing froze a branch on data.
        """
        if method not in METHODS:
            raise ConfigError(f"method is {shown(method)}; expected trace or script")
        example = example_of(self.model, dummy_input, None, None, dynamic_axes)
        outputs = outputs_of(self.model, example, None)
        return self._export(
            path,
            example,
            len(outputs),
            lambda made: self._write(made, example, len(outputs), method),
            lambda made: _running(load_torchscript(made), example),
            {"method": method, "torch": torch.__version__},
        )

    def load_torchscript(self, path: str | os.PathLike[str]) -> torch.jit.ScriptModule:
        """The module of a file, in evaluation mode on the CPU. FormatError: it is no TorchScript file."""
        return load_torchscript(path)

    def _write(self, made: Path, example: Example, outputs: int, method: str) -> list[str]:
        if method == "script":
            with _without_deprecation():
                _save(torch.jit.script(self.model), made)
            return []
        _save(traced_module(self.model, example, outputs), made)
        if example.plain:
            return []
        return [f"the file returns {'the tensor' if outputs == 1 else 'the tensors'} of the answer alone"]


def traced_module(module: torch.nn.Module, example: Example, outputs: int) -> torch.jit.ScriptModule:
    """The module as a trace that takes the example's tensors in order, and returns the first so many of its tensors."""
    tensors = tuple(example.traced().tensors.values())
    with _without_deprecation(), without_gradients():
        trace: Any = torch.jit.trace
        wrapper = module if example.plain else FlatOutputs(module, tuple(example.tensors), outputs).eval()
        found: torch.jit.ScriptModule = trace(wrapper, tensors, check_trace=False)
        return found


def _save(module: Any, made: Path) -> None:
    with made.open("wb") as file:  # given a path, PyTorch ends the process when the disk is full
        torch.jit.save(module, file)


def load_torchscript(path: str | os.PathLike[str]) -> torch.jit.ScriptModule:
    """The module of a file, in evaluation mode on the CPU. FormatError: it is no TorchScript file."""
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file; expected a TorchScript file")
    try:
        with _without_deprecation():
            load: Any = torch.jit.load
            module: torch.jit.ScriptModule = load(os.fspath(path), map_location="cpu").eval()
            return module
    except RuntimeError as error:
        raise FormatError(f"{path}: not a TorchScript file: {first_line(error)}") from error


def _running(module: torch.jit.ScriptModule, example: Example) -> Run:
    def run(tensors: Mapping[str, Tensor]) -> list[Any]:
        with torch.no_grad():
            return arrays_of(module(*tensors.values()))

    return run


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """TorchScript's deprecation is said in the class's documentation, not once a call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
