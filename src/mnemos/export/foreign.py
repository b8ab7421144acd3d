"""Runtimes whose packages need a process of their own: exporters for them, and their files as callables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from mnemos.compress.modules.batches import evaluating
from mnemos.errors import ConfigError, FormatError, ModelError
from mnemos.export import worker
from mnemos.export.causes import obstacle, refuse_random
from mnemos.export.comparison import compare
from mnemos.export.environments import DEVICES
from mnemos.export.example import Example, answer_of, example_of
from mnemos.export.exporter import TOLERANCE, ExportReport, ModelExporter
from mnemos.export.messages import first_line
from mnemos.export.programs import running
from mnemos.export.rms_norm import spelled_out
from mnemos.formats.whole_file import late_errors

Arrays = dict[str, npt.NDArray[Any]]
Programs = Mapping[str, torch.export.ExportedProgram | ScriptModule]


class RemoteError(Exception):
    """What the other process raised; subclasses have the name of its class."""


class ForeignProcess:
    """A Python that runs `worker.py` for one runtime, until it is closed."""

    def __init__(self, runtime: str, packages: Sequence[str], make_environment: bool = False) -> None:
        """packages: what the runtime needs. Errors: those of `Environment.python`."""
        python = DEVICES.python(packages, runtime, make_environment)
        self._runtime = runtime
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process; what the libraries print
        self._process = subprocess.Popen(
            [str(python), "-I", "-W", "ignore", worker.__file__, runtime],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
        )  # fmt: skip

    def ask(self, command: str, arrays: Arrays | None = None, **fields: Any) -> tuple[dict[str, Any], Arrays]:
        """Sends a request and waits for its answer.

        Raises OSError for what the file system refused there, RemoteError for anything else, also for its end.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            worker.send(requests, {"command": command, **fields}, arrays or {})
            received = worker.receive(answers)
        except BrokenPipeError:
            received = None
        if received is None:
            raise RemoteError(f"the process of {self._runtime} ended with {self._process.wait()}: {self._last_words()}")
        message, found = received
        if message.get("errno"):
            raise OSError(message["errno"], os.strerror(message["errno"]))
        if "error" in message:
            raise type(message["kind"], (RemoteError,), {})(message["error"])
        return message, found

    def close(self) -> None:
        """Ends the process. It may be called again."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                file.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


class ForeignModel:
    """A file of another runtime, run in a process of the runtime's own. Called with arrays or tensors, in order.

    about: what the runtime says of the file. To be closed, or used in a `with`.
    """

    def __init__(self, process: ForeignProcess, path: Path) -> None:
        """FormatError: the runtime cannot load the file."""
        self._process, self._path = process, path
        if not path.exists():
            process.close()
            raise FormatError(f"{path}: no such file")
        try:
            self.about, _ = process.ask("load", path=str(path.absolute()))
        except (OSError, RemoteError) as error:
            process.close()
            raise FormatError(f"{path}: cannot be loaded: {first_line(error)}") from error

    def __call__(self, *inputs: Any, **named: Any) -> Arrays:
        """The results by name. Inputs are given in order or by name; ConfigError: the file does not take them."""
        given = self._fitting(inputs, named)
        try:
            _, found = self._process.ask("run", given)
        except (OSError, RemoteError) as error:
            shapes = ", ".join(str(array.shape) for array in given.values())
            raise ModelError(f"{self._path}: does not run inputs of {shapes}: {first_line(error)}") from error
        return found

    def seconds(self, budget: float, *inputs: Any, **named: Any) -> float:
        """The least time of those runs that `budget` seconds give, without the way to the process and back."""
        answer, _ = self._process.ask("seconds", self._fitting(inputs, named), budget=budget)
        return float(answer["seconds"])

    @property
    def runs(self) -> bool:
        """Whether the runtime runs files on this system."""
        return bool(self.about.get("runs", True))

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def __enter__(self) -> ForeignModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fitting(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Arrays:
        given = {f"input_{index}": each for index, each in enumerate(inputs)} | dict(named)
        arrays = {
            name: each.detach().numpy() if isinstance(each, Tensor) else np.asarray(each)
            for name, each in given.items()
        }
        return self.checked(arrays)

    def checked(self, arrays: Arrays) -> Arrays:
        """The arrays by the names that the file has for them. ConfigError: it does not take them."""
        return arrays


def one_row(
    module: nn.Module,
    dummy_input: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_axes: Mapping[str, Any] | None,
) -> Example:
    """An example for a runtime with a fixed batch; None: one row of token ids. Unless told otherwise, lengths vary."""
    given = torch.ones((1, 6), dtype=torch.int64) if dummy_input is None else dummy_input
    example = example_of(module, given, input_names, output_names, dynamic_axes)
    if dynamic_axes is not None:
        return example
    return replace(example, axes={name: {1: axes[1]} for name, axes in example.axes.items() if 1 in axes})


def checked_length(max_length: int | None) -> None:
    """ConfigError: it is no length that could vary."""
    if max_length is not None and (type(max_length) is not int or max_length < 2):
        raise ConfigError(f"max_length is {max_length!r}; expected a number from 2")


class ForeignExporter(ModelExporter):
    """Base of the exporters whose runtime has a process of its own.

    make_environment: makes an environment for its packages where this process's do not fit; it takes minutes and 2.5 GB
    under the user's cache folder, once.
    """

    runtime, title = "", ""  # as the process knows it, and as people write it
    packages: tuple[str, ...] = ()
    spells_out_norms = False

    def __init__(self, model: nn.Module, tolerance: float = TOLERANCE, make_environment: bool = False) -> None:
        super().__init__(model, tolerance)
        self._make_environment = make_environment

    def _through_process(
        self,
        path: str | os.PathLike[str],
        example: Example,
        outputs: tuple[str, ...],
        programs: Callable[[], Programs],
        options: Mapping[str, Any],
        load: Callable[[ForeignProcess, Path], ForeignModel],
        arguments: Callable[[Mapping[str, Tensor]], Arrays],
    ) -> ExportReport:
        """Converts in the runtime's process and compares what it runs there.

        programs: makes what is converted, by the names that the process knows.
        """
        with closing(ForeignProcess(self.runtime, self.packages, self._make_environment)) as process:
            versions, _ = process.ask("versions")
            files: list[ForeignModel] = []
            obstacles: list[str] = []

            def write(made: Path) -> list[str]:
                with spelled_out(self.model) if self.spells_out_norms else nullcontext():
                    converted = programs()
                exported = [one for one in converted.values() if not isinstance(one, ScriptModule)]
                obstacles.extend(filter(None, map(obstacle, exported)))
                with TemporaryDirectory() as folder:
                    handed = {name: str(_handed(one, Path(folder) / name)) for name, one in converted.items()}
                    try:
                        process.ask("convert", programs=handed, path=str(made.absolute()), options=dict(options))
                    except RemoteError as error:
                        refuse_random(self.model, example.tensors)
                        raise ModelError(
                            f"{type(self.model).__name__} cannot be exported to {self.format}: "
                            f"{self._has_no(obstacles) or self._problem(error)}"
                        ) from error
                files.append(load(process, made))
                if files[0].runs:
                    return []
                what, (program, *_) = f"program for the {self.format}", converted.values()
                # Without what torch.export asserts of sizes: the operators are right for more, which is compared.
                run = running(program if isinstance(program, ScriptModule) else program.module(check_guards=False))
                same = compare(self.model, run, example, len(outputs), self.tolerance, what)
                return [
                    f"{self.title} does not run on {sys.platform}: what was converted was compared (error "
                    f"{same.error:.1e}, {same.inputs} inputs), and the file read again, but not run"
                ]

            def run(tensors: Mapping[str, Tensor]) -> list[npt.NDArray[Any]]:
                try:
                    answer = files[0](**arguments(tensors))
                except ModelError as error:
                    if obstacles:
                        raise ModelError(self._has_no(obstacles)) from error
                    raise
                # A runtime that knows the names may give them in any order, such as the alphabet's.
                return [answer[name] for name in outputs] if set(outputs) == set(answer) else list(answer.values())

            return self._export(
                path, example, len(outputs), write, lambda made: run if files[0].runs else None, versions,
                timed=lambda tensors, budget: files[0].seconds(budget, **arguments(tensors)),
            )  # fmt: skip

    def _longest(self, example: Example, asked: int | None, usual: int) -> int:
        """The largest size of what varies: the one that is asked for, else the usual one or what the module takes.

        ModelError: the module does not take what is asked for.
        """
        most = usual if asked is None else asked
        if not example.axes:
            return most
        with evaluating(self.model), torch.no_grad():
            problem = self._refused(example, most)
            if problem is None:
                return most
            taken, refused = max(next(example.others())[0].values()), most  # of the example it is known
            while refused - taken > 1:
                middle = (taken + refused) // 2
                if self._refused(example, middle) is None:
                    taken = middle
                else:
                    refused = middle
        if asked is None:
            return taken
        raise ModelError(
            f"{type(self.model).__name__} does not take a length of {most}: {first_line(problem)}; the longest that it "
            f"takes is {taken}"
        )

    def _refused(self, example: Example, size: int) -> Exception | None:
        """What the module raises for a size of all that varies."""
        try:
            answer_of(self.model, example.values(dict.fromkeys(example.axis_names, size), "random", 0))
        except Exception as error:
            return error
        return None

    def _has_no(self, obstacles: list[str]) -> str:
        return f"{self.title} has no form of {obstacles[0]}" if obstacles else ""

    def _problem(self, error: RemoteError) -> str:
        """What a converter's error says, without its own words for operators that it does not know."""
        unknown = _UNKNOWN.search(str(error))
        if unknown:
            return f"{self.title} has no form of {unknown[1] or unknown[2]}; write that by other operators"
        return first_line(error)


def _handed(program: Any, path: Path) -> Path:
    """The file of a program or a trace for the process."""
    with path.open("wb") as file, late_errors(file) as patient:
        if isinstance(program, ScriptModule):
            torch.jit.save(program, patient)
        else:
            torch.export.save(program, patient)
    return path


_UNKNOWN = re.compile(r"Unsupported fx node (\w+)|conversion (?:function )?for op '(\w+)' not implemented")
