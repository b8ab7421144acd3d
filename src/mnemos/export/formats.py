"""The formats that a built-in architecture can be exported to, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mnemos.errors import ConfigError, FormatError
from mnemos.export.exporter import ExportReport
from mnemos.export.onnx import ONNXExporter
from mnemos.export.programs import ProgramExporter
from mnemos.export.torch_form import TorchForm, WithCache, cache_example
from mnemos.export.torchscript import TorchScriptExporter
from mnemos.formats.checkpoint import open_checkpoint

TOLERANCE = 5e-5  # of the largest logit: float32's rounding through some tens of layers
EXAMPLE = torch.tensor([[1, 2, 3, 4]])


@dataclass(frozen=True)
class Format:
    """file: its name in the folder; write: exports a form to a path; help: for users."""

    file: str
    write: Callable[[TorchForm, Path], ExportReport]
    help: str


FORMATS = {
    "onnx": Format(
        "model.onnx",
        lambda form, path: ONNXExporter(WithCache(form), TOLERANCE).export(path, *cache_example(form)),
        "ONNX with a cache: input_ids, attention_mask and past_key_values.N.key/value",
    ),
    "onnx-no-cache": Format(
        "model-no-cache.onnx",
        lambda form, path: ONNXExporter(form, TOLERANCE).export(path, EXAMPLE),
        "ONNX: token ids to logits",
    ),
    "torchscript": Format(
        "model.pt", lambda form, path: TorchScriptExporter(form, TOLERANCE).export(path, EXAMPLE), "TorchScript, traced"
    ),
    "pt2": Format(
        "model.pt2",
        lambda form, path: ProgramExporter(form, TOLERANCE).export(path, EXAMPLE),
        "a program of torch.export",
    ),
    "aoti": Format(
        "model-compiled.pt2",
        lambda form, path: ProgramExporter(form, TOLERANCE).export(path, EXAMPLE, compile=True),
        "machine code by AOTInductor",
    ),
}


def export_model(
    source: Path,
    formats: list[str],
    folder: Path,
    *,
    overwrite: bool = False,
    begun: Callable[[str], None] = lambda name: None,
) -> dict[str, ExportReport]:
    """Exports a GGUF file or Hugging Face folder of a built-in architecture to each format, in float32.

    begun: called with each format's name before it is written. ConfigError: an unknown format, or a file that exists;
    other errors are those of `TorchForm` and the exporters. A format that fails leaves the ones before it.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"--to is {','.join(formats)!r}; expected some of {', '.join(FORMATS)}, with commas between")
    there = [folder / FORMATS[name].file for name in formats if (folder / FORMATS[name].file).exists()]
    if there and not overwrite:
        raise ConfigError(f"{there[0]} exists; choose another folder, or replace it with --overwrite")
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; expected a folder")
    form = TorchForm(open_checkpoint(source))
    reports = {}
    for name in dict.fromkeys(formats):
        begun(name)
        reports[name] = FORMATS[name].write(form, folder / FORMATS[name].file)
    return reports
