"""LiteRT: Google's runtime for phones and browsers, once TensorFlow Lite."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemos.errors import ConfigError, shown
from mnemos.export.example import Example
from mnemos.export.exporter import ExportReport, outputs_of, refuse_bfloat16
from mnemos.export.foreign import Arrays, ForeignExporter, ForeignModel, ForeignProcess, Programs, one_row
from mnemos.export.programs import exported_program, running

PACKAGES = ("torch", "litert-torch", "ai-edge-litert")
LENGTHS = (1, 8, 64)


class LiteRTExporter(ForeignExporter):
    """Exports a module to LiteRT (`.tflite`), with a signature for each length, which share the weights.

    exporter = LiteRTExporter(model)
    exporter.export("model.tflite", torch.randint(0, 100, (1, 10)), lengths=(1, 16, 128))
    with exporter.load_litert("model.tflite") as file:
        logits = file(ids)["logits"]  # ids (1, 1), (1, 16) or (1, 128)
    """

    format = "LiteRT file"
    runtime, title = "litert", "LiteRT"
    packages = PACKAGES

    def export(
        self,
        path: str | os.PathLike[str],
        dummy_input: Any = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> ExportReport:
        """Writes the file. Integers are int32 in it. LiteRT has no sizes that vary.

        lengths: of the token ids, each the shape of a signature, length_1, length_8, ...; None: those of 1, 8 and 64
        that the module takes. A module without token ids has the one signature of dummy_input's shapes. The batch is
        that of dummy_input (None: one row of token ids).
        ConfigError: an argument that does not fit; MissingDependencyError: no environment has LiteRT; ModelError: it
        cannot express the module, or the results differ.
        """
        sizes = LENGTHS if lengths is None else tuple(lengths)
        if not sizes or len(set(sizes)) != len(sizes) or any(type(n) is not int or n < 1 for n in sizes):
            raise ConfigError(f"lengths is {shown(lengths)}; expected different numbers from 1, such as (1, 8, 64)")
        refuse_bfloat16(self.model, "LiteRT computes nothing")
        example = one_row(self.model, dummy_input, input_names, output_names, None)
        if example.axes:
            most = self._longest(example, None if lengths is None else max(sizes), max(sizes))
            sizes = tuple(size for size in sizes if size <= most)
            first = example.values(dict.fromkeys(example.axis_names, sizes[0]), "random", 0)
            example = one_row(self.model, first, input_names, output_names, None)
            example = replace(example, only=dict.fromkeys(example.axis_names, sizes))
        outputs = outputs_of(self.model, example, output_names)
        samples = {
            f"length_{size}": example.values(dict.fromkeys(example.axis_names, size), "random", 0)
            for size in (sizes if example.axes else ())
        } or {"serving_default": example.tensors}
        inputs = {name: _inputs(example, tensors) for name, tensors in samples.items()}
        return self._through_process(
            path,
            example,
            outputs,
            lambda: self._programs(example, samples, len(outputs)),
            {"signatures": inputs, "outputs": list(outputs)},
            LiteRTFile,
            lambda tensors: {example.names[name]: tensor.numpy() for name, tensor in tensors.items()},
        )

    def _programs(self, example: Example, samples: Mapping[str, dict[str, Tensor]], outputs: int) -> Programs:
        """One program for all signatures if it takes them, else one for each, as its code differs by the length."""
        try:
            longest = dict.fromkeys(example.axis_names, max(*(max(sizes) for sizes in example.only.values()), 2))
            one = exported_program(self.model, example, outputs, longest, scans=False)
            run = running(one.module())
            for tensors in samples.values():
                run(tensors)
            return {"program": one}
        except Exception:
            return {
                name: exported_program(self.model, example.fixed(tensors), outputs, scans=False)
                for name, tensors in samples.items()
            }

    def load_litert(self, path: str | os.PathLike[str]) -> LiteRTFile:
        """A file, to be called. FormatError: it is none of LiteRT's."""
        return load_litert(path, self._make_environment)


class LiteRTFile(ForeignModel):
    """A `.tflite` file. The signature that runs is the one of the inputs' shapes."""

    def checked(self, arrays: Arrays) -> Arrays:
        signatures: dict[str, dict[str, list[int]]] = self.about["signatures"]
        names = list(next(iter(signatures.values())))
        if len(names) == 1 and list(arrays) == ["input_0"]:
            arrays = {names[0]: arrays["input_0"]}
        given = {name: list(array.shape) for name, array in arrays.items()}
        if given not in signatures.values():
            taken = "; ".join(f"{name} {shapes}" for name, shapes in signatures.items())
            raise ConfigError(f"the inputs are {given}; the file has fixed shapes, and takes {taken}")
        return arrays


def load_litert(path: str | os.PathLike[str], make_environment: bool = False) -> LiteRTFile:
    """A file, to be called. FormatError: it is none of LiteRT's; MissingDependencyError: nothing here runs it."""
    return LiteRTFile(ForeignProcess("litert", PACKAGES, make_environment), Path(path))


def _inputs(example: Example, tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    """The shape and the type of each input of a signature."""
    return {
        example.names[name]: (
            list(tensor.shape),
            "int32" if tensor.dtype == torch.int64 else str(tensor.dtype).removeprefix("torch."),
        )
        for name, tensor in tensors.items()
    }
