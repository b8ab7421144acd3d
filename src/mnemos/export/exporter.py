"""What all exporters do: write beside the path, try the file against the module, and only then give it its name."""

from __future__ import annotations

import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating
from mnemos.compress.modules.quantized_model import QuantizedModel
from mnemos.errors import CapacityError, ConfigError, FormatError, MnemosError, ModelError, shown
from mnemos.export.causes import refuse_random, refuse_scripts
from mnemos.export.comparison import Compared, Run, Timed, compare, speed_ratios
from mnemos.export.example import Example, answer_of, plain_attention
from mnemos.export.messages import first_line
from mnemos.export.report import ExportReport as ExportReport
from mnemos.export.tracing import uncompiled, uncompiled_parts
from mnemos.formats.whole_file import beside, not_written
from mnemos.models.foreign.signature import device_of

TOLERANCE = 1e-5  # of the largest value expected
_LOGGERS = ("torch", "torch.onnx", "torch.fx", "torch._dynamo", "torch.export", "torch.fx.experimental.symbolic_shapes",
            "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")  # fmt: skip


class FlatOutputs(nn.Module):
    """A module that returns the tensors of another one's answer, in order; no cache is asked for or returned."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.module = module
        self._names, self._outputs = names, outputs

    def forward(self, *tensors: Tensor) -> Any:
        found = [tensor for _, tensor in answer_of(self.module, dict(zip(self._names, tensors, strict=True)))]
        return found[0] if self._outputs == 1 else tuple(found[: self._outputs])


class WithValues(nn.Module):
    """A module with other values of some parameters, by their names; the module itself keeps its own."""

    def __init__(self, module: nn.Module, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
        super().__init__()
        self.module = module
        self._values = {name: torch.from_numpy(value) for name, value in values.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self._values, args, kwargs)


class ModelExporter:
    """Base of the exporters. report: of the last export, or None.

    The module is not changed: it is exported in evaluation mode, and every part has its own mode again afterwards. A
    `QuantizedModel` is exported as the ordinary module with its rounded weights, and a module on a GPU as it is on the
    CPU, since a file is for other machines.
    """

    format = ""
    is_folder = False  # what is written
    through_program = True  # of torch.export

    def __init__(self, model: nn.Module, tolerance: float = TOLERANCE) -> None:
        """tolerance: the largest difference from the module that a file may have, over the largest value."""
        if isinstance(model, QuantizedModel):
            model = model.dequantize()
        model = uncompiled(model)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        if device_of(model).type not in ("cpu", "meta"):
            model = copy.deepcopy(model).cpu()
        self.model = model
        if not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance is {shown(tolerance)}; expected a number from 0 to 1, such as 1e-5")
        self.tolerance = tolerance
        self.report: ExportReport | None = None

    def _export(
        self,
        path: str | os.PathLike[str],
        example: Example,
        outputs: int,
        write: Callable[[Path], list[str]],
        load: Callable[[Path], Run | None],
        versions: dict[str, str],
        compared: Callable[[Run], Compared] | None = None,
        timed: Timed | None = None,
    ) -> ExportReport:
        """Writes by `write` (which returns notes), compares what `load` runs, and moves the result to `path`.

        load: None where nothing here runs the file, which `write` has a note about then.
        compared: compares in place of the comparison with the module, to the exporter's tolerance.

        A file of that name is replaced once the new one has proved itself. ModelError: the module cannot be exported,
        or the file's results differ; FormatError, CapacityError: it cannot be written. None of them leaves anything.
        """
        target, needed = Path(path), parameter_bytes(self.model)
        if target.is_dir() and not self.is_folder:
            raise ConfigError(f"{target} is a folder; expected the path of a file to write")
        if target.is_file() and self.is_folder:
            raise ConfigError(f"{target} is a file; expected the path of a folder to write")
        with beside(target) as folder:
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise CapacityError(
                    f"{target}: cannot be written: its weights need {needed / 1e6:.1f} MB, and the disk has "
                    f"{free / 1e6:.1f} MB free; give a folder on another disk"
                )
            made = folder / target.name
            with evaluating(self.model), uncompiled_parts(self.model), plain_attention():
                notes = self._written(target, made, example, write)
                run = self._loaded(target, made, load)
                if run is None:
                    found, speed = None, dict[str, float]()
                else:
                    compare_all = compared or partial(self._compared, example, outputs)
                    found, speed = compare_all(run), speed_ratios(self.model, run, example, timed)
                del run  # a runtime may hold the files, which some systems do not let be moved then
            if found is not None and found.left_out:
                notes.append(f"the module itself does not take {'; '.join(found.left_out)}")
            files = sorted(folder.iterdir(), key=lambda file: file == made)  # the named file last
            size = sum(_size(file) for file in files if file == made or file.name.startswith(made.stem + "."))
            for file in files:
                if file.is_dir():
                    shutil.rmtree(target.parent / file.name, ignore_errors=True)
                os.replace(file, target.parent / file.name)
        self.report = ExportReport(
            self.format, target, size, needed, None if found is None else found.error,
            () if found is None else found.shapes, 0 if found is None else found.inputs, versions, speed, tuple(notes),
            "" if found is None else found.unit,
        )  # fmt: skip
        return self.report

    def _loaded(self, target: Path, made: Path, load: Callable[[Path], Run | None]) -> Run | None:
        try:
            return load(made)
        except FormatError as error:  # about a file that was just written
            problem = str(error).replace(str(made), target.name)
            raise ModelError(f"the {self.format} of {type(self.model).__name__} cannot be run: {problem}") from error

    def _compared(self, example: Example, outputs: int, run: Run) -> Compared:
        return compare(self.model, run, example, outputs, self.tolerance, self.format)

    def _written(self, target: Path, made: Path, example: Example, write: Callable[[Path], list[str]]) -> list[str]:
        try:
            with warnings.catch_warnings(record=True) as caught, _quiet():
                warnings.simplefilter("always")
                notes = write(made)
        except MnemosError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # others are of a converter, about source code
                raise not_written(target, error, parameter_bytes(self.model)) from error
            if self.through_program:
                refuse_scripts(self.model, self.format)
            refuse_random(self.model, example.tensors)
            raise ModelError(
                f"{type(self.model).__name__} cannot be exported to {self.format}: {first_line(error)}"
            ) from error
        return notes + _frozen(caught)


def _frozen(caught: list[warnings.WarningMessage]) -> list[str]:
    """A note on values that tracing took for constants, of which the comparison finds those that are none."""
    warned = (one for one in caught if "TracerWarning" in type(one.message).__name__)
    places = list(dict.fromkeys(f"{Path(one.filename).name}, line {one.lineno}" for one in warned))
    if not places:
        return []
    more = f", and in {len(places) - 1} other places" if len(places) > 1 else ""
    return [
        f"tracing took a value for a constant in {places[0]}{more}; the file was right at every size and value tried"
    ]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file())


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters and persistent buffers; memory that several share counts once."""
    storages = {}
    for tensor in module.state_dict().values():
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr() or id(tensor)] = min(storage.nbytes(), tensor.numel() * tensor.element_size())
    return sum(storages.values())


def refuse_bfloat16(model: nn.Module, because: str) -> None:
    """ModelError for parameters in bfloat16, in which `because`."""
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} has parameters in bfloat16, in which {because}; export model.float()")


def outputs_of(module: nn.Module, example: Example, names: Any) -> tuple[str, ...]:
    """Names of the results to export: those asked for, else the module's own, else logits, output_1, ..."""
    found = example.answer
    if not found:
        raise ModelError(f"{type(module).__name__} returns no tensor; expected logits")
    if names is None:
        return tuple(name or ("logits" if index == 0 else f"output_{index}") for index, (name, _) in enumerate(found))
    asked = tuple(str(name) for name in names)
    if not 0 < len(asked) <= len(found):
        raise ConfigError(f"output_names has {len(asked)} names; the module returns {len(found)} tensors")
    return asked


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converters' own logs, whole graphs among them: what matters of them is in the error or the report."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
