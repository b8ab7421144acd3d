"""Quantized files beside each other: what importance, --search and --size lose at the same number of bytes.

    python benchmarks/compressed_files.py MODEL --calibrate TEXT --text TEXT [--types q4_k_m q4_0] [--markdown FILE]

MODEL is quantized to each mix twice, calibrated on one text: by importance, which gives the bytes of llama.cpp's
quantizer with the same importance matrix, and with --search; and once for --size of the q4_k_m file. The divergence
from MODEL in float32 is measured on another text, in chunks of 512 tokens, with weights alone rounded. --spread makes
a master without a grid of a model that is quantized already, on which no type is favoured: each weight is moved by a
random part of its block's step (seeded), as `master.gguf` in the folder given. --markdown puts the table into FILE
between the lines `<!-- files -->` and `<!-- /files -->`.

    python benchmarks/compressed_files.py MODEL --speed [--calibrate TEXT] [--types q4_k_m q4_0]

prints instead how long writing each file takes, beside what ggml's own encoders take for its tensors alone (libgguf),
in processor time of one thread, and whether all bytes are the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnemos.bench.results import insert_table
from mnemos.compress.budget import candidates, choose, measure_options
from mnemos.compress.calibration import Calibration
from mnemos.compress.evaluate import CHUNK, Remembered, compare, cut
from mnemos.compress.quantize import Importance, gguf_checkpoint, open_model, quantize_file, unchanged_bytes
from mnemos.engine.engine import InferenceEngine
from mnemos.formats.gguf_writer import writing_gguf
from mnemos.formats.tensor import Tensor
from mnemos.formats.tensor_types import TensorType
from mnemos.hub.sources import resolve

TYPES = ("q5_k_m", "q4_k_m", "q3_k_m", "q4_0", "q2_k", "iq4_nl")
SIZED = "q4_k_m"  # whose file --size is given the size of
LEVELS, BLOCK = 15, 32  # of the grid that --spread undoes: 16 values in each block of 32


@dataclass(frozen=True)
class Measured:
    """A file's bytes of tensors, and what it has lost."""

    bytes: int
    divergence: float
    percentile: float
    agreement: float


def spread(source: Path, out: Path) -> None:
    """Writes the model in float32, with the weights of its quantized matrices spread evenly over their grids' cells."""
    model, rng = open_model(source), np.random.default_rng(1234)
    with writing_gguf(out, model.written, [(name, one.shape) for name, one in model.tensors.items()]) as writer:
        for name, entry in model.tensors.items():
            tensor = entry if isinstance(entry, Tensor) else entry.load()
            values = tensor.dequantize()
            if tensor.type.is_quantized and name.startswith("blk."):
                cells = values.reshape(-1, BLOCK)
                step = np.ptp(cells, axis=1, keepdims=True) / LEVELS
                values = (cells + (rng.random(cells.shape, dtype=np.float32) - 0.5) * step).reshape(values.shape)
            writer.write(name, TensorType.F32, [Tensor.from_array(name, values.astype(np.float32)).data])


def measure(path: Path, exact: Remembered, chunks: list[list[int]]) -> Measured:
    """The file against the master, with float32 activations."""
    with InferenceEngine.from_pretrained(path, dtype="float32", prefix_cache=False) as engine:
        found = compare(engine, exact, chunks)
    size = sum(len(tensor.data) for tensor in gguf_checkpoint(path).tensors.values())
    return Measured(size, found.divergence, found.percentile(99), found.agreement)


def time_types(source: Path, types: Sequence[str], importance: Importance | None) -> None:
    """Prints a row for each type: processor time here and of ggml's encoders, and whether the bytes are the same."""
    import libgguf

    tensors = gguf_checkpoint(source).tensors
    print("| type | here, file | ggml, tensors | same bytes |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        for name in types:
            began = time.process_time()
            rows = quantize_file(source, out, name, importance=importance).rows
            ours, theirs, equal = time.process_time() - began, 0.0, True
            written = gguf_checkpoint(out).tensors
            for row in (row for row in rows if row.changes):
                values = np.ascontiguousarray(tensors[row.name].dequantize().reshape(row.shape))
                weights = None if importance is None else importance.values.get(row.name)
                began = time.process_time()
                data = libgguf.quantize_rows(values, int(row.type), weights)
                theirs += time.process_time() - began
                equal &= bool(np.array_equal(np.ravel(data), np.ravel(written[row.name].data)))
            print(f"| {name} | {ours:.2f} s | {theirs:.2f} s | {'yes' if equal else 'NO'} |", flush=True)


def line(name: str, plain: Measured | None, searched: Measured) -> str:
    """A row of the table."""
    before = "| |" if plain is None else f"| {plain.divergence:.4f} | {100 * plain.agreement:.1f}% "
    ratio = "" if plain is None else f"{searched.divergence / plain.divergence:.2f} x"
    return (
        f"| {name} | {searched.bytes / 1e6:.1f} MB {before}| {searched.divergence:.4f} | {searched.percentile:.3f} "
        f"| {100 * searched.agreement:.1f}% | {ratio} |"
    )


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a known name, a GGUF file or a Hugging Face folder")
    parser.add_argument("--calibrate", metavar="TEXT", type=Path, nargs="+", default=[], help="joined by a newline")
    parser.add_argument("--text", metavar="TEXT", type=Path, help="what the loss is measured on")
    parser.add_argument("--speed", action="store_true", help="how long writing takes, in place of what is lost")
    parser.add_argument("--types", metavar="TYPE", nargs="+", default=TYPES)
    parser.add_argument("--tokens", metavar="N", type=int, default=4096, help="of the text")
    parser.add_argument("--spread", metavar="FOLDER", type=Path, help="make and use a master without a grid there")
    parser.add_argument("--no-size", action="store_true", help="leave out --size, which takes the longest")
    parser.add_argument("--markdown", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    source = resolve(arguments.model)
    if arguments.spread is not None:
        arguments.spread.mkdir(parents=True, exist_ok=True)
        if not (arguments.spread / "master.gguf").exists():
            spread(source, arguments.spread / "master.gguf")
        source = arguments.spread / "master.gguf"
    text = "\n".join(path.read_text(encoding="utf-8") for path in arguments.calibrate)
    if arguments.speed:
        found = Calibration(gguf_checkpoint(source), text).importance() if text else None
        time_types(source, arguments.types, None if found is None else Importance(found, "text"))
        return
    if not text or arguments.text is None:
        parser.error("--calibrate and --text are needed")
    calibration = Calibration(gguf_checkpoint(source), text)
    wanted = list(candidates(calibration.checkpoint.tensors))
    importance = Importance(calibration.importance(wanted=wanted), "text")
    lines = [
        "| type | tensors | importance | same token | search | 99% | same token | search / importance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    master = InferenceEngine.from_pretrained(source, dtype="float32", prefix_cache=False)
    with master, tempfile.TemporaryDirectory() as folder:
        out, exact = Path(folder) / "model.gguf", Remembered(master)
        assert master.tokenizer is not None
        ids = master.tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special=False)
        chunks = cut(ids[: arguments.tokens], CHUNK)
        plain: dict[str, Measured] = {}
        target = 0
        for name in arguments.types:
            quantize_file(source, out, name, importance=importance)
            plain[name] = measure(out, exact, chunks)
            if name == SIZED:
                target = out.stat().st_size
            quantize_file(source, out, name, importance=importance, search=calibration)
            lines.append(line(name, plain[name], measure(out, exact, chunks)))
            print(lines[-1], flush=True)
        if SIZED in plain and not arguments.no_size:
            options = measure_options(calibration)
            types = choose(options, size=target - unchanged_bytes(source, options)).types
            quantize_file(source, out, SIZED, importance=importance, search=calibration, types=types)
            lines.append(line(f"--size of {SIZED}", plain[SIZED], measure(out, exact, chunks)))
            print(lines[-1], flush=True)
    if arguments.markdown is not None:
        insert_table(arguments.markdown, "files", "\n".join(lines))


if __name__ == "__main__":
    main()
