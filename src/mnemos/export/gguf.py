"""GGUF files: from files and modules, in any of llama.cpp's types, by Mnemos' own writer."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnemos.compress.quantize import Model, model_of, quantize_model
from mnemos.errors import ConfigError, UnsupportedError
from mnemos.export.logits import compare_logits
from mnemos.export.report import ExportReport
from mnemos.export.sources import Source, measured_without_memory, open_source
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.whole_file import beside
from mnemos.hub.cache import Progress
from mnemos.models.llama_cpp import refused_because

TOLERANCE = 1e-5  # of the largest logit, where no weight's type changes
MODULE_TOLERANCE = 1e-3  # beside a module in memory, whose own rounding and activations count too


def export_to_gguf(
    model: Any,
    output_path: str | os.PathLike[str],
    quantization_type: str | None = None,
    llama_cpp_path: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    drop_memory: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model as one GGUF file, which llama.cpp and everything around it read.

    model              a known name; the path of a GGUF file (in parts, too), a Hugging Face folder, or a checkpoint of
                       Mini-LLM or nanoGPT; a module of transformers, Mini-LLM or nanoGPT; a memory-augmented model,
                       whose file only Mnemos reads
    quantization_type  one of `mnemos quantize`'s (q8_0, q4_k_m, f16, ...); None: the weights as they are stored, a GGUF
                       file's blocks byte for byte
    llama_cpp_path     not needed: taken so that programs written for other exporters run
    tokenizer          one of transformers, or a folder with one; None: the model's own
    drop_memory        writes the base of a memory-augmented model, after a warning of how much its predictions lose
    overwrite          replaces a file of that name

    The file is read again and run before it gets its name: its logits must be those of the model, unless weights
    changed their type; then the report says how far they are. Tensors are made and written one at a time.
    ConfigError: an unknown type, a file that exists, weights that are quantized already; UnsupportedError: the
    architecture or the tokenizer cannot be expressed in GGUF, by name; ModelError: the file differs from the model;
    FormatError, CapacityError: it cannot be written. None of them leaves anything.
    """
    if llama_cpp_path is not None:
        warnings.warn("llama_cpp_path is not needed: GGUF files are written without llama.cpp", stacklevel=2)
    target = Path(output_path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; expected the path of a file to write")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; choose another path, or replace it (overwrite)")
    with open_source(model, tokenizer) as source:
        lost: tuple[str, ...] = ()
        if drop_memory:
            base, note = measured_without_memory(source.checkpoint)
            source, lost = Source(base, source.tokenizer), (note,)
        described = model_of(source.checkpoint, source.tokenizer)
        because = refused_because(described.metadata, described.tensors)
        if because is not None and source.checkpoint.kind != "gguf":
            raise UnsupportedError(
                f"{source.checkpoint.path}: llama.cpp cannot run it: {because}; mnemos quantize makes a GGUF file for "
                "Mnemos alone"
            )
        with beside(target) as work:
            made = work / "model.gguf"
            report = _write(source, described, made, quantization_type, progress)
            os.replace(made, target)
    return replace(report, path=target, notes=(*report.notes, *lost))


def _write(source: Source, model: Model, made: Path, type: str | None, progress: Progress | None) -> ExportReport:
    written = quantize_model(model, made, type, progress=progress)
    exact = not any(row.changes for row in written.rows)
    module = source.module if exact and _is_float32(source) else None
    tolerance = MODULE_TOLERANCE if module is not None else TOLERANCE
    what = f"the GGUF file of {source.checkpoint.path.name}"
    found = compare_logits(source.checkpoint, module, open_checkpoint(made), tolerance if exact else None, what)
    others = sorted({row.reason for row in written.rows if row.reason})
    return ExportReport(
        f"GGUF {written.type}" if type is not None else "GGUF",
        made,
        made.stat().st_size,
        sum(row.source_bytes for row in written.rows),
        found.error,
        found.shapes,
        found.inputs,
        {"version": "3"},
        notes=(*found.notes, *others),
    )


def _is_float32(source: Source) -> bool:
    return all(tensor.type.name == "F32" for tensor in source.checkpoint.tensors.values())
