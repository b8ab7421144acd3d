"""The other side of `foreign.ForeignProcess`: converts and runs a program of torch.export for one runtime.

Started as `python -I worker.py RUNTIME` by a Python that has the runtime's packages and need not have Mnemos. Requests
come in on standard input and answers leave on standard output: a line of JSON, then the bytes of the arrays it lists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import IO, Any

import numpy as np
import torch

_SCALAR_TYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}
Arrays = dict[str, Any]  # NumPy arrays by name, in the order of the module's arguments or results


class ExecuTorch:
    """`.pte` files, with XNNPACK's kernels where it has them."""

    packages = ("executorch", "torch")

    def convert(self, programs: dict[str, str], path: str, options: dict[str, Any]) -> dict[str, Any]:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            torch.export.load(programs["program"]), partitioner=[XnnpackPartitioner()]
        )
        with open(path, "wb") as file:
            file.write(lowered.to_executorch().buffer)
        return {}

    def load(self, path: str) -> dict[str, Any]:
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(path)  # the method borrows from it
        self._method = self._program.load_method("forward")
        about = self._method.metadata
        inputs = [about.input_tensor_meta(index) for index in range(about.num_inputs())]
        types = [_SCALAR_TYPES.get(each.dtype(), str(each.dtype())) for each in inputs]
        return {"largest": [list(each.sizes()) for each in inputs], "types": types}

    def run(self, arrays: Arrays) -> Arrays:
        answer = self._method.execute([torch.from_numpy(array) for array in arrays.values()])
        return {f"output_{index}": tensor.numpy() for index, tensor in enumerate(answer)}


class LiteRT:
    """`.tflite` files with a signature for each shape, over one copy of the weights. Integers are int32."""

    packages = ("litert-torch", "ai-edge-litert", "torch")

    def convert(self, programs: dict[str, str], path: str, options: dict[str, Any]) -> dict[str, Any]:
        import litert_torch

        modules = {
            name: _Named(torch.export.load(file).module(), options["outputs"]) for name, file in programs.items()
        }
        converter: Any = litert_torch
        for name, inputs in options["signatures"].items():
            examples = {
                label: torch.ones(shape, dtype=getattr(torch, dtype)) for label, (shape, dtype) in inputs.items()
            }
            module = modules[name] if name in modules else modules["program"]
            converter = converter.signature(name, module, sample_kwargs=examples)
        converter.convert().export(path)
        return {}

    def load(self, path: str) -> dict[str, Any]:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(path)  # the runners borrow from it
        self._runners: dict[frozenset[Any], Any] = {}
        signatures = {}
        for name in self._interpreter.get_signature_list():
            runner = self._interpreter.get_signature_runner(name)
            shapes = {
                label: [int(size) for size in each["shape"]] for label, each in runner.get_input_details().items()
            }
            self._runners[_shapes(shapes)] = runner
            signatures[name] = shapes
        return {"signatures": signatures}

    def run(self, arrays: Arrays) -> Arrays:
        runner = self._runners[_shapes({name: array.shape for name, array in arrays.items()})]
        return dict(runner(**{name: _int32(array) for name, array in arrays.items()}))


class CoreML:
    """`.mlpackage` folders, which are written and read anywhere and run on macOS. Integers are int32."""

    packages = ("coremltools", "torch")

    def convert(self, programs: dict[str, str], path: str, options: dict[str, Any]) -> dict[str, Any]:
        import coremltools

        precision = coremltools.precision.FLOAT16 if options["half"] else coremltools.precision.FLOAT32
        source: Any
        given = None
        if "trace" in programs:
            load: Any = torch.jit.load
            source, given = (
                load(programs["trace"]),
                [_tensor_type(name, *each) for name, each in options["inputs"].items()],
            )
        else:
            source = torch.export.load(programs["program"]).run_decompositions({})
        model = coremltools.convert(
            source,
            inputs=given,
            outputs=[coremltools.TensorType(name=name) for name in options["outputs"]],
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=precision,
        )
        spec = model.get_spec()
        for feature, name in zip(list(spec.description.input), options["inputs"], strict=True):
            for each in feature.type.multiArrayType.shapeRange.sizeRanges:
                if each.lowerBound != each.upperBound:
                    each.lowerBound = 1  # torch.export proves no program for 1, but the operators are the same
            coremltools.utils.rename_feature(spec, feature.name, name)
        coremltools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True).save(path)
        return {}

    def load(self, path: str) -> dict[str, Any]:
        import coremltools

        runs = sys.platform == "darwin"
        self._model = coremltools.models.MLModel(path, skip_model_load=not runs)
        spec = self._model.get_spec()
        program = [block for each in spec.mlProgram.functions.values() for block in each.block_specializations.values()]
        return {
            "runs": runs,
            "inputs": {each.name: _feature(each.type.multiArrayType) for each in spec.description.input},
            "outputs": [each.name for each in spec.description.output],
            "operators": sorted({operation.type for block in program for operation in block.operations}),
        }

    def run(self, arrays: Arrays) -> Arrays:
        return dict(self._model.predict({name: _int32(array) for name, array in arrays.items()}))


def _tensor_type(name: str, sizes: list[list[int]], kind: str) -> Any:
    """Core ML's description of an input with the smallest and the largest size of each axis."""
    import coremltools

    shape = [low if low == high else coremltools.RangeDim(low, high) for low, high in sizes]
    return coremltools.TensorType(name=name, shape=shape, dtype=np.dtype(kind))


class _Named(torch.nn.Module):
    """A program whose arguments and results have names. Its integers are widened to the int64 that PyTorch expects."""

    def __init__(self, module: Any, outputs: list[str]) -> None:
        super().__init__()
        self.module, self._outputs = module, outputs

    def forward(self, **inputs: Any) -> dict[str, Any]:
        answer = self.module(*(_int64(tensor) for tensor in inputs.values()))
        return dict(zip(self._outputs, answer if isinstance(answer, (tuple, list)) else [answer], strict=True))


def _int64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def _int32(array: Any) -> Any:
    return array.astype(np.int32) if array.dtype == np.int64 else array


def _shapes(shapes: dict[str, Any]) -> frozenset[Any]:
    return frozenset((name, tuple(shape)) for name, shape in shapes.items())


def _feature(array: Any) -> dict[str, Any]:
    """The smallest and the largest size of each axis, and the type, of Core ML's description of an array."""
    ranges = [[each.lowerBound, each.upperBound] for each in array.shapeRange.sizeRanges]
    return {
        "sizes": ranges or [[size, size] for size in array.shape],
        "type": array.DESCRIPTOR.enum_types_by_name["ArrayDataType"].values_by_number[array.dataType].name,
    }


RUNTIMES = {"executorch": ExecuTorch, "litert": LiteRT, "coreml": CoreML}


def answer(runtime: Any, request: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """What a request is answered with; it may raise anything."""
    command = request["command"]
    if command == "convert":
        return runtime.convert(request["programs"], request["path"], request["options"]), {}
    if command == "load":
        return runtime.load(request["path"]), {}
    if command == "versions":
        return {name: version(name) for name in runtime.packages}, {}
    if command == "seconds":  # the best of several runs, without the way here and back
        best, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < request["budget"]:
            start = time.perf_counter()
            runtime.run(arrays)
            best = min(best, time.perf_counter() - start)
        return {"seconds": best}, {}
    return {}, runtime.run(arrays)


def receive(file: IO[bytes]) -> tuple[dict[str, Any], Arrays] | None:
    """A message and its arrays; None: the other side has closed."""
    line = file.readline()
    if not line:
        return None
    message = json.loads(line)
    arrays = {}
    for name, dtype, shape in message.pop("arrays"):
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(bytearray(file.read(count)), dtype=dtype).reshape(shape)
    return message, arrays


def send(file: IO[bytes], message: dict[str, Any], arrays: Arrays) -> None:
    """Writes a message and its arrays."""
    listed = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    file.write(json.dumps({**message, "arrays": listed}).encode() + b"\n")
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).tobytes())
    file.flush()


def main() -> None:
    """Answers requests until the other side closes. What libraries print goes to standard error."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    runtime = RUNTIMES[sys.argv[1]]()
    while (received := receive(requests)) is not None:
        try:
            message, arrays = answer(runtime, *received)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message, arrays = {"kind": type(error).__name__, "error": lines[0][:300] if lines else ""}, {}
            if isinstance(error, OSError):
                message["errno"] = error.errno
        send(answers, message, arrays)


if __name__ == "__main__":
    main()
