"""Exported files beside PyTorch, and Mnemos' engine beside ONNX Runtime: errors, sizes and speeds.

    python benchmarks/exports.py [--sizes 0.2M,10M,135M] [--threads N] [--repeats 20]

Llamas with random weights are exported with their caches, and run one token after 128 others ("decoding") and 128
tokens at once ("prompt"). A speed is PyTorch's least time over the file's, of repeats that take turns, so that other
programs disturb all alike. The engine runs GGUF files of the same weights, with its own sampling and bookkeeping.
Prints a Markdown table. Needs transformers, onnxruntime and onnxscript.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantized_module import times
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mnemos import GenerationConfig, InferenceEngine
from mnemos.export.exporter import ExportReport
from mnemos.export.onnx import ONNXExporter
from mnemos.export.torch_form import TorchForm, WithCache, cache_example
from mnemos.export.torchscript import TorchScriptExporter
from mnemos.formats.checkpoint import open_checkpoint

LENGTH, NEW = 128, 32
TOLERANCE = 1e-4
# hidden size, layers, heads, key/value heads, size inside the MLP, vocabulary
SHAPES = {
    "0.2M": (64, 3, 4, 2, 176, 512),
    "10M": (256, 9, 4, 2, 704, 8192),
    "135M": (576, 30, 9, 3, 1536, 49152),
}


def build(size: str, folder: Path) -> Path:
    """A folder with a random Llama of that size."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def inputs(form: TorchForm, tokens: int, past: int) -> list[Tensor]:
    """What the form with a cache takes for so many new tokens after a text."""
    ids = torch.randint(0, form.spec.vocabulary_size, (1, past + tokens), generator=torch.Generator().manual_seed(0))
    cache = form.continued(ids[:, :past], None, ())[1] if past else ()
    empty = torch.zeros((1, form.kv_heads, 0, form.head_dim))
    sides = [side for pair in cache for side in pair] or [empty] * (2 * form.layers)
    return [ids[:, past:], torch.ones((1, past + tokens), dtype=torch.int64), *sides]


def session_call(path: Path, given: list[Tensor], threads: int) -> Callable[[], object]:
    """A call of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), given, strict=True)}
    return lambda: session.run(["logits"], fed)


def measure(size: str, folder: Path, threads: int, repeats: int) -> list[tuple[Any, ...]]:
    """Rows of the table: size, format, MB, error, and how many times as fast as PyTorch decoding and prompt are."""
    source = build(size, folder / size)
    form = TorchForm(open_checkpoint(source))
    module, (example, _, outputs, axes) = WithCache(form), cache_example(form)
    reports: dict[str, ExportReport] = {
        "TorchScript": TorchScriptExporter(module, TOLERANCE).export(folder / "model.pt", example, dynamic_axes=axes)
    }
    for name, bits in (("ONNX", None), ("ONNX int8", 8), ("ONNX int4", 4)):
        path = folder / f"{name}.onnx"
        reports[name] = ONNXExporter(module, TOLERANCE).export(path, example, None, outputs, axes, bits=bits)
    scripted: Any = torch.jit.load(str(folder / "model.pt"))  # type: ignore[no-untyped-call]
    seconds = []
    for tokens, past in ((1, LENGTH), (LENGTH, 0)):
        given = inputs(form, tokens, past)
        calls = {"PyTorch": lambda given=given: module(*given), "TorchScript": lambda given=given: scripted(*given)}
        calls |= {name: session_call(report.path, given, threads) for name, report in reports.items() if "ONNX" in name}
        seconds.append(times(calls, repeats))
    rows = [
        (size, name, report.bytes / 1e6, report.error, *(one["PyTorch"] / one[name] for one in seconds))
        for name, report in reports.items()
    ]
    for type_ in ("q8_0", "q4_0"):
        file = folder / f"{size}-{type_}.gguf"
        command = [sys.executable, "-m", "mnemos", "quantize", str(source), "--type", type_, "--out", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        own = engine_seconds(file, form, threads, repeats)
        speeds = (one["PyTorch"] / mine for one, mine in zip(seconds, own, strict=True))
        rows.append((size, f"Mnemos {type_}", file.stat().st_size / 1e6, None, *speeds))
    return rows


def engine_seconds(file: Path, form: TorchForm, threads: int, repeats: int) -> tuple[float, float]:
    """Of a token after the prompt, and of the prompt with its first token."""
    ids = inputs(form, LENGTH, 0)[0][0].tolist()
    with InferenceEngine.from_pretrained(file, threads=threads, prefix_cache=False) as engine:

        def run(tokens: int) -> Callable[[], object]:
            config = GenerationConfig(strategy="greedy", max_new_tokens=tokens, ignore_eos=True)
            return lambda: engine.generate(ids, config=config)

        least = times({"first": run(1), "all": run(1 + NEW)}, max(3, repeats // 4))
    return (least["all"] - least["first"]) / NEW, least["first"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; speeds are times PyTorch's\n")
    print("| parameters | file | MB | error | decoding | prompt |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes.split(","):
            for row in measure(size, Path(folder), arguments.threads, arguments.repeats):
                of, name, mb, error, decoding, prompt = row
                shown = "" if error is None else f"{error:.1e}"
                print(f"| {of} | {name} | {mb:.1f} | {shown} | {decoding:.2f} | {prompt:.2f} |", flush=True)


if __name__ == "__main__":
    main()
