"""ONNX: for ONNX Runtime, onnxruntime-genai, web browsers and TensorRT."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnemos.compress.modules.batches import evaluating
from mnemos.errors import ConfigError, FormatError, ModelError, shown
from mnemos.export.attention_axes import FourAxes
from mnemos.export.comparison import RELATIVE, Compared, Run, compare
from mnemos.export.example import SUM, Example, answer_of, example_of
from mnemos.export.exporter import ExportReport, FlatOutputs, ModelExporter, WithValues, outputs_of, refuse_bfloat16
from mnemos.export.forwards import parts_of
from mnemos.export.messages import BY_TRACING, first_line
from mnemos.export.onnx_weights import BITS, round_weights
from mnemos.export.recurrent import is_recurrent, scanned
from mnemos.export.requirements import imported
from mnemos.export.rms_norm import spelled_out
from mnemos.export.tracing import without_gradients

DEFAULT_OPSET = 20
_OLDEST, _FIRST_OF_DYNAMO = 9, 18  # torch.export's programs use operators of opset 18
_LAST_OF_TRACING = 20
_OF_ACTIVATIONS = 0.05  # what 8 bits of the activations may change of the results, as a relative root mean square
_LARGEST_FILE = 2 * 1024**3 - 2**20  # of one protocol buffer, less what the graph takes


class ONNXExporter(ModelExporter):
    """Exports a module to ONNX, and runs the file in ONNX Runtime before it counts.

    exporter = ONNXExporter(model)
    exporter.export("model.onnx", torch.randint(0, 100, (1, 10)), dynamic_axes={"input_ids": {0: "batch"}})
    session = exporter.load_onnx("model.onnx")
    """

    format = "ONNX file"

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_axes: Mapping[str, Any] | None = None,
        opset_version: int = DEFAULT_OPSET,
        bits: int | None = None,
    ) -> ExportReport:
        """Writes the file; the file's opset is the one asked for.

        dummy_input: a tensor, a tuple of them in the order of forward's parameters, or a mapping by their names; None:
        token ids. dynamic_axes: {input: {axis: name}}; None: the batch varies, and the length of token ids; {}:
        nothing does.
        bits: 8 or 4: the weights of products and embeddings in so many, for ONNX Runtime (`export.onnx_weights`). The
        file is then compared with the module whose weights are rounded in the same way, and the report's error is that
        from the module itself, as a root mean square over the results' own.
        Opsets from 18 on are written through torch.export, which refuses branches on data; older ones by tracing, and
        up to 20 modules with recurrent layers, too, which are ONNX's own layers then, and not a scan over time.
        ConfigError: an argument that does not fit; ModelError: the module cannot be expressed, or the file differs.
        """
        onnx, _ = _packages()
        newest = onnx.defs.onnx_opset_version()
        if not isinstance(opset_version, int) or not _OLDEST <= opset_version <= newest:
            raise ConfigError(f"opset_version is {shown(opset_version)}; expected {_OLDEST} to {newest}")
        if bits is not None and bits not in BITS:
            raise ConfigError(f"bits is {shown(bits)}; expected 8 or 4, or None for weights as they are")
        if bits is not None and opset_version < _FIRST_OF_DYNAMO:
            raise ConfigError(
                f"opset_version is {opset_version}; weights of {bits} bits need {_FIRST_OF_DYNAMO} or more"
            )
        refuse_bfloat16(self.model, "ONNX Runtime computes nothing on a CPU")
        example = example_of(self.model, dummy_input, input_names, output_names, dynamic_axes)
        outputs = outputs_of(self.model, example, output_names)
        versions = {"opset": str(opset_version), "torch": torch.__version__, "onnx": onnx.__version__}
        rounded: dict[str, Any] = {}

        def write(made: Path) -> list[str]:
            return self._write(made, example, outputs, opset_version, bits, rounded)

        def compared(run: Run) -> Compared:
            return self._compared_rounded(run, example, len(outputs), rounded)

        return self._export(
            path,
            example,
            len(outputs),
            write,
            lambda made: _runner(made, example),
            versions if bits is None else {**versions, "weights of": f"{bits} bits"},
            None if bits is None else compared,
        )

    def load_onnx(self, path: str | os.PathLike[str]) -> Any:
        """An `onnxruntime.InferenceSession` of the file on the CPU. FormatError: it is no ONNX file."""
        return load_onnx(path)

    def verify(self, path: str | os.PathLike[str], dummy_input: Any = None) -> float:
        """How far the file's results are from the module's, over the largest value. ModelError: too far."""
        session = load_onnx(path)
        labels = [entry.name for entry in session.get_inputs()]
        axes = {
            entry.name: {axis: size for axis, size in enumerate(entry.shape) if isinstance(size, str)}
            for entry in session.get_inputs()
        }
        example = example_of(self.model, dummy_input, labels, None, axes)
        outputs = len(session.get_outputs())
        with evaluating(self.model):
            return compare(self.model, _running(session, example), example, outputs, self.tolerance, self.format).error

    def _compared_rounded(self, run: Run, example: Example, outputs: int, rounded: dict[str, Any]) -> Compared:
        """Compares with the module of rounded weights, then says how far the module itself is."""
        like = WithValues(self.model, rounded)
        same = replace(example, answer=answer_of(like, example.tensors))
        compare(like, run, same, outputs, _OF_ACTIVATIONS, self.format, RELATIVE)
        return compare(self.model, run, example, outputs, math.inf, self.format, RELATIVE)

    def _write(
        self, made: Path, example: Example, outputs: tuple[str, ...], opset: int, bits: int | None,
        rounded: dict[str, Any],
    ) -> list[str]:  # fmt: skip
        """Writes the file; `rounded` is filled with the parameters' new values where weights are to have `bits`."""
        traced = example.traced()
        wrapper = FlatOutputs(self.model, tuple(example.tensors), len(outputs)).eval()
        arguments = tuple(traced.tensors.values())
        names = [example.names[name] for name in example.tensors]
        options: dict[str, Any] = {"input_names": names, "output_names": list(outputs), "opset_version": opset}
        notes = []
        if opset >= _FIRST_OF_DYNAMO and not (bits is None and opset <= _LAST_OF_TRACING and _has_layers(self.model)):
            shapes = tuple(
                {axis: "total" if SUM in label else label for axis, label in example.axes.get(name, {}).items()} or None
                for name in example.tensors
            )
            with FourAxes(), scanned(self.model):
                program: Any = torch.onnx.export(
                    wrapper, arguments, dynamo=True, verbose=False, optimize=False,
                    dynamic_shapes=(shapes,) if example.axes else None, **options,
                )  # fmt: skip
            if bits is not None:
                prefix = "module."  # of `FlatOutputs`
                weights = {prefix + name for name, _ in self.model.named_parameters(remove_duplicate=False)}
                values = round_weights(program.model, bits, weights)
                rounded |= {name.removeprefix(prefix): value for name, value in values.items()}
            _simplify(program.model)
            large = sum(value.const_value.nbytes for value in program.model.graph.initializers.values()) > _LARGEST_FILE
            program.save(str(made), external_data=large)
            if large:
                notes.append(f"the weights are in {made.name}.data, which belongs beside the file")
        else:
            dynamic = {example.names[name]: axes for name, axes in example.axes.items()}
            with spelled_out(self.model), without_gradients():
                try:
                    torch.onnx.export(
                        wrapper, arguments, str(made), dynamo=False, dynamic_axes=_with_outputs(dynamic, outputs),
                        do_constant_folding=False, **options,
                    )  # fmt: skip
                except torch.onnx.errors.OnnxExporterError as error:
                    raise ModelError(
                        f"{type(self.model).__name__} cannot be exported with opset {opset}: {first_line(error)}; "
                        f"opsets from {_FIRST_OF_DYNAMO} on are written through torch.export, which has more operators"
                    ) from error
            notes.append(BY_TRACING)
        found = file_opset(made)
        if found != opset:
            raise ModelError(
                f"{type(self.model).__name__} was written with opset {found}, not {opset}: its operators need the "
                f"newer one; export with opset_version={found}"
            )
        return notes


def _has_layers(module: nn.Module) -> bool:
    """Whether all recurrent layers of a module that has some are layers of ONNX's own, which know no projection."""
    return is_recurrent(module) and not any(part.proj_size for part in parts_of(module, nn.RNNBase))


def _simplify(model: Any) -> None:
    """Folds small constants, but no weights: the transpose of a tied head would become a second copy of it.

    What torch.export notes at each operator goes too: stacks with the paths of source files, half of a small file.
    """
    import_module("onnxscript").optimizer.optimize_ir(model, input_size_limit=256, output_size_limit=256)
    for part in (model.graph, *model.graph.all_nodes()):
        part.metadata_props.clear()
        for value in part.outputs:
            value.metadata_props.clear()


def _with_outputs(dynamic: dict[str, dict[int, str]], outputs: tuple[str, ...]) -> dict[str, dict[int, str]]:
    """The axes of the first input are those of the results too, as far as names are concerned."""
    if not dynamic:
        return {}
    first = {axis: name for axis, name in next(iter(dynamic.values())).items() if axis < 2}
    return {**dynamic, **{name: first for name in outputs if name not in dynamic}}


def load_onnx(path: str | os.PathLike[str]) -> Any:
    """An `onnxruntime.InferenceSession` of a file, on the CPU. FormatError: it is no ONNX file."""
    _, runtime = _packages()
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file; expected an ONNX file")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(f"{path}: ONNX Runtime cannot load it: {first_line(error)}") from error


def _runner(made: Path, example: Example) -> Run:
    return _running(load_onnx(made), example)


def _running(session: Any, example: Example) -> Run:
    taken = {entry.name for entry in session.get_inputs()}
    return lambda tensors: session.run(
        None,
        {example.names[name]: tensor.numpy() for name, tensor in tensors.items() if example.names[name] in taken},
    )


def _packages() -> tuple[Any, Any]:
    """onnx and onnxruntime, at the versions of the extra `export`; MissingDependencyError names what does not fit."""
    onnx, _, runtime = (imported(name, "export", "exporting to ONNX") for name in ("onnx", "onnxscript", "onnxruntime"))
    return onnx, runtime


def file_opset(path: str | os.PathLike[str]) -> int:
    """The version of the ONNX operators that a file uses."""
    onnx, _ = _packages()
    written = onnx.load(os.fspath(path), load_external_data=False)
    return int(next(entry.version for entry in written.opset_import if entry.domain in ("", "ai.onnx")))
