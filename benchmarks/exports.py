"""Exported files beside PyTorch, and Mnemos' engine beside ONNX Runtime: errors, sizes and speeds.

    python benchmarks/exports.py [--sizes 0.2M,10M,135M] [--threads N] [--repeats 20] [--folder FOLDER]

Llamas with random weights are exported with their caches, and run one token after 128 others ("decoding") and 128
tokens at once ("prompt"). A speed is PyTorch's least time over the file's, of repeats that take turns, so that other
programs disturb all alike. ONNX Runtime runs the float32 file, those of Mnemos with weights of 8 and 4 bits, and what
its own `quantize_dynamic` makes of the first; OpenVINO, in float32, keeps the cache itself. The engine runs GGUF files
of the same weights, with its own sampling
and bookkeeping; the last lines divide its speed by the best of ONNX Runtime's.
With --folder the files are kept there, and those of an earlier run are measured without being written again.
Prints a Markdown table. Needs transformers, onnxruntime, onnxscript and openvino.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantized_module import times
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mnemos import GenerationConfig, InferenceEngine
from mnemos.export.onnx import ONNXExporter
from mnemos.export.openvino import OpenVINOExporter
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
FORMATS = ("TorchScript", "ONNX", "ONNX int8", "ONNX int4", "ONNX dynamic int8", "OpenVINO")
OWN = ("q8_0", "q4_0")  # what the engine runs


@dataclass(frozen=True)
class File:
    """path: in the folder; error: of the export's report, None where nothing was compared."""

    path: str
    megabytes: float
    error: float | None


def build(size: str, folder: Path) -> None:
    """Writes a random Llama of that size."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def write(name: str, form: TorchForm, folder: Path) -> File:
    """Exports the form with its cache, in one of `FORMATS`."""
    module, (example, _, outputs, axes) = WithCache(form), cache_example(form)
    if name == "TorchScript":
        report = TorchScriptExporter(module, TOLERANCE).export(folder / "model.pt", example, dynamic_axes=axes)
    elif name == "OpenVINO":
        state = dict(zip(list(example)[2:], outputs[1:], strict=True))
        report = OpenVINOExporter(module, TOLERANCE).export(folder / "model.xml", example, None, outputs, axes, state)
    elif name == "ONNX dynamic int8":
        return quantize_dynamic(folder / "ONNX.onnx", folder / f"{name}.onnx")
    else:
        bits = {"ONNX int8": 8, "ONNX int4": 4}.get(name)
        path = folder / f"{name}.onnx"
        report = ONNXExporter(module, TOLERANCE).export(path, example, None, outputs, axes, bits=bits)
    return File(report.path.name, report.bytes / 1e6, report.error)


def quantize_dynamic(source: Path, target: Path) -> File:
    """ONNX Runtime's own int8, per channel, of a file whose products all have a weight that its quantizer sees."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    model = onnx.load(source)
    weights = {one.name: one for one in model.graph.initializer}
    for node in list(model.graph.node):  # the transposed embedding as a head of its own, or it stays in float32
        if node.op_type == "Transpose" and node.input[0] in weights:
            values = onnx.numpy_helper.to_array(weights[node.input[0]]).T.copy()
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.graph.value_info[:]
    quantize(model, target, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    return File(target.name, target.stat().st_size / 1e6, None)


def files_of(size: str, folder: Path) -> tuple[TorchForm, dict[str, File]]:
    """The form, and the files of every format and of the engine's types; those that are missing are written."""
    source, made = folder / "model", folder / "files.json"
    if not (source / "config.json").exists():
        build(size, source)
    found = {name: File(**one) for name, one in json.loads(made.read_text()).items()} if made.exists() else {}
    form = TorchForm(open_checkpoint(source))

    def keep(name: str, file: File) -> None:
        found[name] = file
        made.write_text(json.dumps({name: asdict(one) for name, one in found.items()}))

    for name in FORMATS:
        if name not in found:
            keep(name, write(name, form, folder))
    for type_ in OWN:
        if type_ not in found:
            file = folder / f"{type_}.gguf"
            command = [sys.executable, "-m", "mnemos", "quantize", str(source), "--type", type_, "--out", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            keep(type_, File(file.name, file.stat().st_size / 1e6, None))
    return form, found


def inputs(form: TorchForm, tokens: int, past: int) -> list[Tensor]:
    """What the form with a cache takes for so many new tokens after a text."""
    ids = torch.randint(0, form.spec.vocabulary_size, (1, past + tokens), generator=torch.Generator().manual_seed(0))
    cache = form.continued(ids[:, :past], None, ())[1] if past else ()
    empty = torch.zeros((1, form.kv_heads, 0, form.head_dim))
    sides = [side for pair in cache for side in pair] or [empty] * (2 * form.layers)
    return [ids[:, past:], torch.ones((1, past + tokens), dtype=torch.int64), *sides]


def session_of(path: Path, threads: int) -> Any:
    """A session of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session_call(session: Any, given: list[Tensor]) -> Callable[[], object]:
    """A call of the session for the logits alone."""
    fed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), given, strict=True)}
    return lambda: session.run(["logits"], fed)


def openvino_call(path: Path, threads: int, given: list[Tensor]) -> Callable[[], object]:
    """A call of OpenVINO's file, whose own cache is set to what is given first, for the logits alone."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    fed = {"input_ids": given[0].numpy(), "attention_mask": given[1].numpy(), "beam_idx": np.zeros(1, np.int32)}
    names = [f"{layer}.{side}" for layer in range(len(given) // 2 - 1) for side in ("key", "value")]
    states = {one.name: one for one in request.query_state()}
    sides = [states[f"past_key_values.{name}present.{name}"] for name in names]
    before = [openvino.Tensor(side.contiguous().numpy()) for side in given[2:]]

    def call() -> object:
        request.reset_state()
        if given[2].numel():
            for side, tensor in zip(sides, before, strict=True):
                side.state = tensor
        return request.infer(fed)["logits"]

    return call


def measure(size: str, folder: Path, threads: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Prints the rows of a size; returns how many times as fast as PyTorch decoding and prompt are, by file."""
    form, files = files_of(size, folder)
    module = WithCache(form)
    scripted: Any = torch.jit.load(str(folder / files["TorchScript"].path))  # type: ignore[no-untyped-call]
    sessions = {name: session_of(folder / files[name].path, threads) for name in FORMATS if "ONNX" in name}
    seconds = []
    for tokens, past in ((1, LENGTH), (LENGTH, 0)):
        given = inputs(form, tokens, past)
        calls = {"PyTorch": lambda given=given: module(*given), "TorchScript": lambda given=given: scripted(*given)}
        calls |= {name: session_call(session, given) for name, session in sessions.items()}
        calls["OpenVINO"] = openvino_call(folder / files["OpenVINO"].path, threads, given)
        seconds.append(times(calls, repeats))
    del sessions
    for type_ in OWN:
        own = engine_seconds(folder / files[type_].path, form, threads, repeats)
        for one, mine in zip(seconds, own, strict=True):
            one[type_] = mine
    first, second = ({name: one["PyTorch"] / one[name] for name in files} for one in seconds)
    speeds = {name: (first[name], second[name]) for name in files}
    for name, file in files.items():
        shown, error = f"Mnemos {name}" if name in OWN else name, "" if file.error is None else f"{file.error:.1e}"
        decoding, prompt = speeds[name]
        print(f"| {size} | {shown} | {file.megabytes:.1f} | {error} | {decoding:.2f} | {prompt:.2f} |", flush=True)
    return speeds


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
    parser.add_argument("--folder", type=Path, help="keeps the files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; speeds are times PyTorch's\n")
    print("| parameters | file | MB | error | decoding | prompt |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for size in arguments.sizes.split(","):
            folder = (arguments.folder or Path(scratch)) / size
            found[size] = measure(size, folder, arguments.threads, arguments.repeats)
    for size, speeds in found.items():
        best = [max(speeds[name][column] for name in speeds if "ONNX" in name) for column in (0, 1)]
        for name in OWN:
            decoding, prompt = (mine / theirs for mine, theirs in zip(speeds[name], best, strict=True))
            print(f"\n{size}, Mnemos {name} over ONNX Runtime's best: decoding {decoding:.2f} x, prompt {prompt:.2f} x")


if __name__ == "__main__":
    main()
