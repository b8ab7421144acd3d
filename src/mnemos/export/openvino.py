"""OpenVINO: Intel's runtime for its CPUs, GPUs and NPUs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemos.errors import ConfigError, FormatError, ModelError
from mnemos.export.comparison import Run
from mnemos.export.example import Example, example_of
from mnemos.export.exporter import ExportReport, ModelExporter, outputs_of, refuse_bfloat16
from mnemos.export.messages import BY_TRACING, first_line
from mnemos.export.programs import exported_program
from mnemos.export.recurrent import is_recurrent
from mnemos.export.requirements import imported
from mnemos.export.torchscript import traced_module

BEAMS = "beam_idx"
_UNCONVERTED = re.compile(r"onver.* for(?: operations)?: (.+)|-- (aten\S+) with a message")
_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINOExporter(ModelExporter):
    """Exports a module to OpenVINO's two files, NAME.xml (the graph) and NAME.bin (the weights, in float32).

    exporter = OpenVINOExporter(model)
    exporter.export("model.xml", torch.randint(0, 100, (1, 10)))
    logits = exporter.load_openvino("model.xml")(ids)[0]
    """

    format = "OpenVINO model"

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic_axes: Mapping[str, Any] | None = None,
        state: Mapping[str, str] | None = None,
    ) -> ExportReport:
        """Writes the files; `path` ends in .xml. The arguments are those of `ONNXExporter.export`.

        state: {input: output} of a cache whose first axis is the batch. The runtime then keeps it from call to call
        instead of taking and returning it: empty at first and after `InferRequest.reset_state()`. Its rows are chosen
        by a further input, beam_idx (batch,), as openvino-genai expects.
        ConfigError: an argument that does not fit; ModelError: torch.export cannot express the module (it names
        branches on data), or the results differ.
        """
        openvino = _openvino()
        if Path(path).suffix != ".xml":
            raise ConfigError(f"path is {os.fspath(path)!r}; expected a name that ends in .xml")
        refuse_bfloat16(self.model, "an OpenVINO model would answer otherwise")
        example = example_of(self.model, dummy_input, input_names, output_names, dynamic_axes)
        outputs = outputs_of(self.model, example, output_names)
        kept = _state(state, example, outputs)
        return self._export(
            path,
            example,
            len(outputs),
            lambda made: self._write(made, example, outputs, kept),
            lambda made: _running(load_openvino(made), example, outputs, kept),
            {"torch": torch.__version__, "openvino": openvino.__version__.split("-")[0]},
        )

    def load_openvino(self, path: str | os.PathLike[str]) -> Any:
        """An `openvino.CompiledModel` for the CPU. FormatError: the file is none of OpenVINO's."""
        return load_openvino(path)

    def _write(self, made: Path, example: Example, outputs: tuple[str, ...], state: dict[str, str]) -> list[str]:
        openvino = _openvino()
        recurrent = is_recurrent(self.model)  # of any length by tracing alone: OpenVINO knows no scan
        if recurrent:
            converted = _converted(traced_module(self.model, example, len(outputs)))
        else:
            converted = _converted(exported_program(self.model, example, len(outputs)))
        name_ports(converted, [example.names[name] for name in example.tensors], outputs)
        if state:
            _keep_state(converted, state)
        try:
            openvino.save_model(converted, str(made), compress_to_fp16=False)
        except RuntimeError as error:
            if "iostream" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error  # the one cause in a folder just made
        notes = [f"the weights are in {made.with_suffix('.bin').name}, which belongs beside the file"]
        return [*notes, BY_TRACING] if recurrent else notes


def _converted(program: Any) -> Any:
    """The `openvino.Model` of a `torch.export` program or a trace. ModelError: OpenVINO has no form of an operator."""
    convert = _openvino().convert_model
    try:
        try:
            return convert(program)
        except Exception as error:
            if not _unconverted(error) or not hasattr(program, "run_decompositions"):
                raise
        return convert(program.run_decompositions())  # some that it has no form of are made of others that it has
    except Exception as error:
        if missing := _unconverted(error):
            raise ModelError(f"OpenVINO cannot express {missing}; write that by other operators") from error
        raise


def _unconverted(error: Exception) -> str:
    """The operators that a conversion named as the cause; empty if it is another error."""
    return ", ".join(dict.fromkeys(found[1] or found[2] for found in _UNCONVERTED.finditer(str(error))))


def name_ports(converted: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the inputs and outputs of an `openvino.Model` these names, and no others."""
    for ports, names in ((converted.inputs, inputs), (converted.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    for parameter, name in zip(converted.get_parameters(), inputs, strict=True):
        parameter.set_friendly_name(name)


def load_openvino(path: str | os.PathLike[str]) -> Any:
    """An `openvino.CompiledModel` of a file, for the CPU and in float32. FormatError: it is none of OpenVINO's."""
    openvino = _openvino()
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file; expected an OpenVINO file (.xml)")
    try:
        # Without the hints, a CPU that has bfloat16 computes in it, and caches are kept in 8 bits.
        return openvino.Core().compile_model(os.fspath(path), "CPU", _FLOAT32)
    except Exception as error:
        raise FormatError(f"{path}: OpenVINO cannot load it: {first_line(error)}") from error


def _openvino() -> Any:
    return imported("openvino", "openvino", "exporting to OpenVINO")


def _state(given: Mapping[str, str] | None, example: Example, outputs: Sequence[str]) -> dict[str, str]:
    """The inputs and outputs that become state. ConfigError: there is none of that name."""
    inputs = list(example.names.values())
    for name, output in (given or {}).items():
        if name not in inputs[1:] or output not in outputs:
            raise ConfigError(
                f"state has {name!r}: {output!r}; expected an input after the first ({', '.join(inputs[1:])}) and an "
                f"output ({', '.join(outputs)})"
            )
    return dict(given or {})


def _keep_state(converted: Any, state: Mapping[str, str]) -> None:
    """Turns pairs of inputs and outputs of an `openvino.Model` into variables, with beam_idx to choose their rows."""
    operators = import_module("openvino").opset13
    transformations = import_module("openvino._offline_transformations")
    beams = operators.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    zero = operators.constant(np.int64(0))
    for name in state:
        cache = converted.input(name).get_node()
        readers = cache.output(0).get_target_inputs()
        chosen = operators.gather(cache, beams, zero)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    converted.add_parameters([beams])
    transformations.apply_make_stateful_transformation(converted, dict(state))
    # Empty at first, with as many rows as the first input: a state of no rows could not be chosen from.
    first = converted.inputs[0].get_node()
    batch = operators.gather(operators.shape_of(first, "i64"), operators.constant(np.array([0], np.int64)), zero)
    for operator in converted.get_ops():
        if operator.get_type_name() == "ReadValue":
            sizes = list(operator.get_output_partial_shape(0))[1:]
            rest = np.array([size.get_length() if size.is_static else 0 for size in sizes], np.int64)
            shape = operators.concat([batch, operators.constant(rest)], 0)
            operator.set_arguments([operators.broadcast(operators.constant(np.float32(0)), shape)])
    converted.validate_nodes_and_infer_types()


def _running(compiled: Any, example: Example, outputs: Sequence[str], state: Mapping[str, str]) -> Run:
    taken = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()
    variables = {
        name: next(each for each in request.query_state() if each.name == name + output)
        for name, output in state.items()
    }
    tensor_of = import_module("openvino").Tensor

    def run(tensors: Mapping[str, Tensor]) -> list[Any]:
        given = {example.names[name]: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
        fed = {name: array for name, array in given.items() if name in taken}
        request.reset_state()
        for name, variable in variables.items():
            if given[name].size:
                variable.state = tensor_of(given[name])
        if BEAMS in taken:
            fed[BEAMS] = np.arange(len(next(iter(fed.values()))), dtype=np.int32)
        request.infer(fed)
        kept = {state[name]: variable.state.data for name, variable in variables.items()}
        return [np.array(kept[name] if name in kept else request.get_tensor(name).data) for name in outputs]

    return run
