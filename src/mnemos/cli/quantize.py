"""`mnemos quantize`: a model file in a smaller storage type, and what each of its tensors became."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.terminal import ProgressBar, human_bytes, remark
from mnemos.errors import ConfigError, FormatError

MIX = "q4_k_m"  # what a file with --size or --loss calls itself; its types are its own

if TYPE_CHECKING:
    from mnemos.compress.calibration import Calibration
    from mnemos.compress.plan import Row
    from mnemos.compress.quantize import Importance
    from mnemos.formats.checkpoint import Checkpoint
    from mnemos.formats.tensor_types import TensorType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mnemos.compress.mixes import MIXES

    parser.usage = (
        "mnemos quantize MODEL --type TYPE --out FILE [options]\n"
        "       mnemos quantize MODEL --size 70MB --calibrate TEXT --out FILE [options]"
    )
    parser.add_argument("model", metavar="MODEL", help="a known name, hf:org/name[:file], a .gguf file or a folder")
    parser.add_argument("--type", metavar="TYPE", help=f"{', '.join(MIXES)}")
    parser.add_argument(
        "--out", metavar="FILE", help="the .gguf file to write, or a folder for safetensors (f32, f16, bf16)"
    )
    parser.add_argument("--calibrate", metavar="TEXT", help="a text file on which the weights' importance is measured")
    parser.add_argument(
        "--search", action="store_true", help="with --calibrate: search codes that lose less, at the same size"
    )
    parser.add_argument(
        "--size",
        metavar="BYTES",
        help="in place of --type: the types with the least loss for a file of 70MB, 1.5GB, ...",
    )
    parser.add_argument(
        "--loss", type=float, metavar="NATS", help="in place of --type: the smallest types that diverge by about this"
    )
    parser.add_argument("--imatrix", metavar="FILE", help="a file with that importance, as llama-imatrix writes it")
    parser.add_argument("--save-imatrix", metavar="FILE", help="keep what --calibrate measured, for later or llama.cpp")
    parser.add_argument(
        "--tensor",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="the type of all matrices in whose names this regular expression is found; repeatable, the first wins",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse what the type cannot store, and use no other type"
    )
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        help="also quantize a model that is quantized, with the errors of both",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what each tensor would become")
    parser.epilog = (
        "The types are llama.cpp's and give the same files. An importance matrix lowers the loss of all types below\n"
        "q8_0 and costs nothing later: give a text of the kind that the model will see.\n\n"
        "examples:\n"
        "  mnemos quantize model-f16.gguf --type q4_k_m --calibrate text.txt --out model-q4_k_m.gguf\n"
        "  mnemos quantize model-f16.gguf --type q4_k_s --tensor ffn_down=q6_k --out small.gguf\n"
        "  mnemos quantize model-f16.gguf --size 70MB --calibrate text.txt --out small.gguf\n"
        "  mnemos quantize model-f16.gguf --type q2_k --dry-run"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.compress.plan import mix_named, override_of
    from mnemos.formats.whole_file import check_new
    from mnemos.hub.sources import resolve

    size = None if arguments.size is None else _bytes(arguments.size)
    if arguments.loss is not None and not 0 < arguments.loss < float("inf"):
        raise ConfigError(f"--loss is {arguments.loss}; expected a number of nats above 0, such as 0.02")
    if sum(value is not None for value in (arguments.type, arguments.size, arguments.loss)) != 1:
        raise ConfigError("--type, --size and --loss each say what the tensors become; give one of them")
    if arguments.type is None:
        if arguments.calibrate is None or arguments.dry_run:
            raise ConfigError(
                "--size and --loss measure what each type costs; give --calibrate TEXT, without --dry-run"
            )
        arguments.search = True
    mix_named(arguments.type or MIX)
    overrides = [override_of(text) for text in arguments.tensor]
    if arguments.out is None and not arguments.dry_run:
        raise ConfigError("--out is missing; give the file to write, or --dry-run to see what would be in it")
    if arguments.calibrate is not None and arguments.imatrix is not None:
        raise ConfigError("--calibrate measures what --imatrix reads; give one of them")
    if arguments.save_imatrix is not None and arguments.calibrate is None:
        raise ConfigError("--save-imatrix keeps what --calibrate measures; give that too")
    if arguments.search and arguments.calibrate is None:
        raise ConfigError("--search needs to know what the weights are multiplied with; give --calibrate TEXT too")
    with ProgressBar(arguments.model) as progress:
        source = resolve(arguments.model, progress)
    if arguments.dry_run:
        return _show_plan(source, arguments, overrides)
    if not arguments.out.endswith(".gguf"):
        return _convert(source, arguments)
    check_new(Path(arguments.out), is_file=True)
    from mnemos.compress.quantize import check_plan, open_model

    check_plan(
        open_model(source),
        arguments.type or MIX,
        calibrated=arguments.calibrate is not None or arguments.imatrix is not None,
        overrides=overrides,
        strict=arguments.strict and arguments.type is not None,
        allow_requantize=arguments.allow_requantize,
    )
    calibration = _calibration(source, arguments)
    if calibration is not None and size is not None:
        _check_size(calibration.checkpoint, size, arguments.size)
    importance = _importance(calibration, arguments)
    from mnemos.compress.quantize import quantize_file

    types = None
    if arguments.type is None:
        assert calibration is not None
        types = _choose(calibration, size, arguments)
    began = time.monotonic()
    with ProgressBar(arguments.model, unit="weights") as progress:
        result = quantize_file(
            source,
            Path(arguments.out),
            arguments.type or MIX,
            importance=importance,
            search=calibration if arguments.search else None,
            types=types,
            overrides=overrides,
            strict=arguments.strict,
            allow_requantize=arguments.allow_requantize,
            progress=progress,
        )
    print("\n".join(table(result.rows)))
    print(f"{arguments.out} written in {time.monotonic() - began:.1f} s")
    return 0


def _convert(source: Path, arguments: argparse.Namespace) -> int:
    from mnemos.compress.safetensors import convert_folder

    for option in ("size", "loss", "calibrate", "imatrix", "tensor"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option} is for GGUF files; give --out a name that ends in .gguf")
    with ProgressBar(arguments.model, unit="weights") as progress:
        result = convert_folder(source, Path(arguments.out), arguments.type.lower(), progress=progress)
    print("\n".join(table(result.rows)))
    return 0


def _show_plan(source: Path, arguments: argparse.Namespace, overrides: Sequence[tuple[str, object]]) -> int:
    from mnemos.compress.plan import mix_named, override_of, plan
    from mnemos.compress.quantize import open_model

    model = open_model(source)
    calibrated = arguments.calibrate is not None or arguments.imatrix is not None
    chosen = [override_of(text) for text in arguments.tensor]
    _, mix = mix_named(arguments.type)
    print("\n".join(table(plan(model.tensors, model.metadata, mix, calibrated=calibrated, overrides=chosen))))
    return 0


def _bytes(text: str) -> int:
    """70MB, 1.5GB, 65MiB or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)b?|b)?", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--size is {text!r}; expected a number of bytes such as 70MB or 1.5GB")
    unit = 1024 if found[3] else 1000
    return int(float(found[1]) * unit ** (" kmg".index(found[2]) if found[2] else 0))


def _check_size(checkpoint: Checkpoint, size: int, given: str) -> None:
    """ConfigError, before anything is measured, for a size that no choice of types comes down to."""
    from mnemos.compress.budget import candidates
    from mnemos.compress.quantize import unchanged_bytes

    tensors, types = checkpoint.tensors, candidates(checkpoint.tensors)
    smallest = unchanged_bytes(checkpoint.path, types)
    for name, own in types.items():
        smallest += tensors[name].rows * min(one.row_bytes(tensors[name].columns) for one in own)
    if size < smallest:
        raise ConfigError(f"--size is {given}; the smallest file of this model has {human_bytes(smallest)}")


def _choose(calibration: Calibration, size: int | None, arguments: argparse.Namespace) -> dict[str, TensorType]:
    """The types for --size or --loss, with the loss to expect as a remark."""
    from mnemos.compress.budget import choose, measure_options
    from mnemos.compress.quantize import unchanged_bytes

    with ProgressBar(arguments.model, unit="tensors") as progress:
        options = measure_options(calibration, progress)
    if size is not None:
        size -= unchanged_bytes(calibration.checkpoint.path, options)
    chosen = choose(options, size=size, loss=arguments.loss)
    remark(f"about {chosen.loss:.3g} nats per token are lost, if errors add up")
    return chosen.types


def _calibration(source: Path, arguments: argparse.Namespace) -> Calibration | None:
    if arguments.calibrate is None:
        return None
    from mnemos.compress.calibration import Calibration
    from mnemos.compress.quantize import gguf_checkpoint

    path = Path(arguments.calibrate)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text in UTF-8: {error}") from error
    return Calibration(gguf_checkpoint(source), text)


def _importance(calibration: Calibration | None, arguments: argparse.Namespace) -> Importance | None:
    from mnemos.compress.quantize import Importance

    if arguments.imatrix is not None:
        from mnemos.formats.imatrix import read_imatrix

        matrix = read_imatrix(Path(arguments.imatrix))
        return Importance(matrix.values, matrix.source or Path(arguments.imatrix).name)
    if calibration is None:
        return None
    from mnemos.compress.budget import candidates
    from mnemos.compress.calibration import CHUNK

    name = Path(arguments.calibrate).name
    wanted = list(candidates(calibration.checkpoint.tensors)) if arguments.search else []
    with ProgressBar(arguments.calibrate, unit="tokens") as progress:
        values = calibration.importance(progress, wanted)
    if arguments.save_imatrix is not None:
        from mnemos.formats.imatrix import ImportanceMatrix, write_imatrix

        write_imatrix(Path(arguments.save_imatrix), ImportanceMatrix(values, name, 1), CHUNK)
    return Importance(values, name)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text: tensors that differ only in their layer and became the same are one line."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", row.name)
        groups.setdefault((name, row.source.name, row.type.name, row.reason), []).append(row)
    lines = []
    for (name, source, type_, reason), members in groups.items():
        layers = _spans(int(row.name.split(".")[1]) for row in members) if name.startswith("blk.*.") else ""
        label = name.replace("blk.*.", f"blk.{layers}.") if len(members) == 1 else f"{name} {layers}"
        change = type_ if source == type_ else f"{source} -> {type_}"
        size = human_bytes(sum(row.bytes for row in members))
        lines.append((label, change, size, reason))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    shown = [
        f"{label:<{widths[0]}}  {change:<{widths[1]}}  {size:>{widths[2]}}  {reason}".rstrip()
        for label, change, size, reason in lines
    ]
    before, after = sum(row.source_bytes for row in rows), sum(row.bytes for row in rows)
    weights = sum(_size(row) for row in rows)
    other = sum(1 for row in rows if row.reason and row.reason != "by override")
    summary = f"{human_bytes(before)} -> {human_bytes(after)}, {8 * after / weights:.2f} bits a weight"
    if other:
        summary += f"; {other} of {len(rows)} tensors have another type than the mix's"
    return [*shown, summary]


def _size(row: Row) -> int:
    size = 1
    for extent in row.shape:
        size *= extent
    return size


def _spans(numbers: Iterable[int]) -> str:
    """0-3,7,9-12"""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
