"""`mnemos export`: a model in other runtimes' formats."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.terminal import ProgressBar, one_line
from mnemos.export.formats import FORMATS, export_model

if TYPE_CHECKING:
    from mnemos.export.exporter import ExportReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos export MODEL --to FORMAT[,FORMAT] --out FOLDER [options]"
    parser.add_argument("model", metavar="MODEL", help="a known name, a .gguf file, or a Hugging Face folder")
    parser.add_argument("--to", required=True, metavar="FORMAT[,FORMAT]", help="what to write; see below")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--drop-memory", action="store_true", help="the base of a memory-augmented model; says what that loses"
    )
    parser.add_argument(
        "--make-environment",
        action="store_true",
        help="install what executorch, litert and coreml need into an environment of their own (2.5 GB, once)",
    )
    parser.epilog = (
        "formats:\n" + "\n".join(f"  {name:<19}{one.help}" for name, one in FORMATS.items()) + "\n\n"
        "Each file is run on several sizes and values and compared with the model in float32 before it is kept.\n\n"
        "examples:\n"
        "  mnemos export smollm2-135m --to onnx --out exported\n"
        "  mnemos export model/ --to gguf-q4_k_m --out exported\n"
        "  mnemos export model/ --to onnx,pt2 --out exported --overwrite"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.hub.sources import resolve

    with ProgressBar(arguments.model) as progress:
        source = resolve(arguments.model, progress)
    began = time.perf_counter()

    def begun(name: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  writing {name} and comparing it", file=sys.stderr)

    problems: dict[str, Exception] = {}
    names = [name.strip() for name in arguments.to.split(",") if name.strip()]
    reports = export_model(
        source,
        names,
        Path(arguments.out),
        overwrite=arguments.overwrite,
        drop_memory=arguments.drop_memory,
        make_environment=arguments.make_environment,
        begun=begun,
        failed=problems.__setitem__,
    )
    if reports:
        print(_table(reports))
    for name, report in reports.items():
        for note in report.notes:
            print(f"{name}: {note}", file=sys.stderr)
    for name, problem in problems.items():
        if arguments.debug:
            traceback.print_exception(problem)
        print(f"mnemos: error: {name}: {one_line(problem)}", file=sys.stderr)
    return 1 if problems else 0


def _table(reports: dict[str, ExportReport]) -> str:
    rows = [("format", "file", "MB", "error", "inputs", "to PyTorch")]
    for name, report in reports.items():
        speed = ", ".join(f"{ratio:.2f} x at {size}" for size, ratio in report.speed.items())
        rows.append(
            (
                name,
                str(report.path),
                f"{report.bytes / 1e6:.1f}",
                "not run" if report.error is None else f"{report.error:.1e}",
                str(report.inputs),
                speed,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
