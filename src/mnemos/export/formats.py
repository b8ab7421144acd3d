"""The formats that a built-in architecture can be exported to, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.errors import ConfigError, FormatError
from mnemos.export.requirements import imported
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from mnemos.export.exporter import ExportReport
    from mnemos.export.torch_form import TorchForm

_LONGEST = 512  # tokens, where a runtime reserves memory for the most
_SIGNATURES = (16, 64, 256)
_WITHOUT_TORCH = ("gguf", "safetensors")  # families of formats that need no PyTorch
TOLERANCE = 5e-5  # of the largest logit: float32's rounding through some tens of layers


@dataclass
class ExportSource:
    """A model to export: its files, opened, and what formats are made from, built when first asked for.

    make_environment: whether runtimes that need an environment of their own may make it.
    """

    checkpoint: Checkpoint
    make_environment: bool = False

    @cached_property
    def form(self) -> TorchForm:
        """The architecture as a module of PyTorch, in float32. Errors: those of `TorchForm`."""
        from mnemos.export.torch_form import TorchForm

        return TorchForm(self.checkpoint)


@dataclass(frozen=True)
class Format:
    """path: of the file or folder in the user's folder; write: writes a source to that path; help: a line for users."""

    path: str
    write: Callable[[ExportSource, Path], ExportReport]
    help: str


def _onnx(source: ExportSource, path: Path, bits: int | None = None) -> ExportReport:
    from mnemos.export.genai import DecoderExporter
    from mnemos.export.torch_form import cache_example

    form = source.form
    return DecoderExporter(form, source.checkpoint, TOLERANCE).export(path, *cache_example(form), bits=bits)


def _onnx_no_cache(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.onnx import ONNXExporter

    return ONNXExporter(source.form, TOLERANCE).export(path)


def _torchscript(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.torchscript import TorchScriptExporter

    return TorchScriptExporter(source.form, TOLERANCE).export(path)


def _program(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.programs import ProgramExporter

    return ProgramExporter(source.form, TOLERANCE).export(path)


def _compiled_program(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.programs import ProgramExporter

    return ProgramExporter(source.form, TOLERANCE).export(path, compile=True)


def _openvino(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.openvino import OpenVINOExporter
    from mnemos.export.torch_form import WithCache, cache_example

    inputs, input_names, outputs, axes = cache_example(source.form)
    state = dict(zip(list(inputs)[2:], outputs[1:], strict=True))
    return OpenVINOExporter(WithCache(source.form), TOLERANCE).export(path, inputs, input_names, outputs, axes, state)


def _openvino_no_cache(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.openvino import OpenVINOExporter

    return OpenVINOExporter(source.form, TOLERANCE).export(path)


def _gguf(source: ExportSource, path: Path, type: str | None = None) -> ExportReport:
    from mnemos.export.gguf import export_to_gguf

    return export_to_gguf(source.checkpoint, path, type, overwrite=True)


def _safetensors(source: ExportSource, path: Path, dtype: str | None = None) -> ExportReport:
    from mnemos.export.safetensors import export_to_safetensors

    return export_to_safetensors(source.checkpoint, path, dtype, overwrite=True)


def _executorch(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.executorch import ExecuTorchExporter

    longest = min(_LONGEST, source.form.spec.context_length)
    return ExecuTorchExporter(source.form, TOLERANCE, source.make_environment).export(path, max_length=longest)


def _litert(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.litert import LiteRTExporter

    lengths = [length for length in _SIGNATURES if length <= source.form.spec.context_length]
    return LiteRTExporter(source.form, TOLERANCE, source.make_environment).export(path, lengths=lengths)


def _coreml(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.coreml import CoreMLExporter

    longest = min(_LONGEST, source.form.spec.context_length)
    return CoreMLExporter(source.form, TOLERANCE, source.make_environment).export(path, max_length=longest)


def _tensorrt(source: ExportSource, path: Path) -> ExportReport:
    from mnemos.export.tensorrt import TensorRTExporter
    from mnemos.export.torch_form import WithCache, cache_example

    return TensorRTExporter(WithCache(source.form), TOLERANCE).export(path, *cache_example(source.form))


FORMATS = {
    "onnx": Format("onnx/model.onnx", _onnx, "ONNX with a cache, in a folder that onnxruntime-genai runs"),
    "onnx-int8": Format("onnx-int8/model.onnx", partial(_onnx, bits=8), "the same with weights of 8 bits"),
    "onnx-int4": Format("onnx-int4/model.onnx", partial(_onnx, bits=4), "the same with weights of 4 bits"),
    "onnx-no-cache": Format("model-no-cache.onnx", _onnx_no_cache, "ONNX: token ids to logits"),
    "torchscript": Format("model.pt", _torchscript, "TorchScript, traced"),
    "pt2": Format("model.pt2", _program, "a program of torch.export"),
    "aoti": Format("model-compiled.pt2", _compiled_program, "machine code by AOTInductor, for this kind of CPU"),
    "openvino": Format("openvino_model.xml", _openvino, "OpenVINO with a cache that the runtime keeps"),
    "openvino-no-cache": Format("openvino_model_no_cache.xml", _openvino_no_cache, "OpenVINO: token ids to logits"),
    "executorch": Format("model.pte", _executorch, f"ExecuTorch with XNNPACK's kernels, 1 to {_LONGEST} tokens"),
    "litert": Format("model.tflite", _litert, f"LiteRT, signatures for {', '.join(map(str, _SIGNATURES))} tokens"),
    "coreml": Format("model.mlpackage", _coreml, f"Core ML, 1 to {_LONGEST} tokens"),
    "tensorrt": Format("tensorrt/model.onnx", _tensorrt, "ONNX with a cache, and the command that builds an engine"),
    "gguf": Format("model.gguf", _gguf, "GGUF for llama.cpp; gguf-TYPE: in a type of mnemos quantize, as gguf-q4_k_m"),
    "safetensors": Format(
        "safetensors", _safetensors, "a folder for transformers; safetensors-TYPE: in f32, f16 or bf16"
    ),
}


def format_named(name: str) -> Format:
    """A format by its name, or by the name of one that takes a type and that type. ConfigError: there is none."""
    from mnemos.compress.plan import mix_named

    if name in FORMATS:
        return FORMATS[name]
    family, _, type = name.partition("-")
    if family == "gguf" and type:
        known, _ = mix_named(type)
        return Format(f"model-{known}.gguf", partial(_gguf, type=known), "")
    if family == "safetensors" and type:
        return Format(name, partial(_safetensors, dtype=type), "")
    raise ConfigError(f"--to is {name!r}; expected some of {', '.join(FORMATS)}, with commas between")


def export_model(
    source: Path | Checkpoint,
    formats: list[str],
    folder: Path,
    *,
    overwrite: bool = False,
    drop_memory: bool = False,
    make_environment: bool = False,
    begun: Callable[[str], None] = lambda name: None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, ExportReport]:
    """Exports a GGUF file or Hugging Face folder, which may be open, of a built-in architecture to each format.

    drop_memory: exports the base of a memory-augmented model, after a warning that says what that loses, which every
    report notes too. begun: called with each format's name before it is written.
    failed: called with the name of a format that cannot be written and why; the others are written all the same. None:
    the error is raised, and the formats before it are kept.

    ConfigError: an unknown format, or a file that exists, before anything is written; MissingDependencyError: PyTorch,
    or what a format needs, is not installed; other errors are those of
    `TorchForm` and the exporters.
    """
    if not formats:
        raise ConfigError(f"--to is empty; expected some of {', '.join(FORMATS)}, with commas between")
    chosen = {name: format_named(name) for name in formats}
    there = [folder / one.path for one in chosen.values() if (folder / one.path).exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]} exists; choose another folder, or replace it with --overwrite")
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; expected a folder")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    lost: tuple[str, ...] = ()
    if drop_memory:
        from mnemos.export.sources import measured_without_memory

        checkpoint, note = measured_without_memory(checkpoint)
        lost = (note,)
    model = ExportSource(checkpoint, make_environment)
    reports = {}
    for name, one in chosen.items():
        begun(name)
        try:
            if name.partition("-")[0] not in _WITHOUT_TORCH:
                imported("torch", "export", f"exporting to {name}")
            report = one.write(model, folder / one.path)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
        else:
            reports[name] = replace(report, notes=(*report.notes, *lost))
    return reports
