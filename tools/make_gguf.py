"""Writes GGUF files with random weights and the shapes of well-known models, to measure speed without downloads.

    python tools/make_gguf.py --shape 1.5b --type Q4_K big.gguf
    python tools/make_gguf.py --shape 8b --layers 4 --type Q8_0 part.gguf

Activations stay finite: every matrix has entries of standard deviation 1 / sqrt(columns). Needs the `gguf` package.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from mnemos.formats.gguf import GGUFFile
from mnemos.formats.quants import dequantize
from mnemos.formats.tensor_types import TensorType

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rope_base: float
    epsilon: float
    tied: bool = True
    bias: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape("llama", 512, 256, 544, 2, 4, 2, 256, 1e4, 1e-5),  # for tests
    "135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 8192, 1e5, 1e-5),  # SmolLM2-135M
    "0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, 1e6, 1e-6, bias=True),  # Qwen2.5-0.5B
    "1.5b": Shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 32768, 1e6, 1e-6, bias=True),  # Qwen2.5-1.5B
    "8b": Shape("llama", 128256, 4096, 14336, 32, 32, 8, 8192, 5e5, 1e-5, tied=False),  # Llama-3-8B
}

# llama.cpp's fallback types for columns that are not a multiple of 256.
FALLBACKS = {
    TensorType.Q2_K: TensorType.IQ4_NL,
    TensorType.Q3_K: TensorType.IQ4_NL,
    TensorType.IQ4_XS: TensorType.IQ4_NL,
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}
# The offsets of a block's float16 scale and minimum, and the factor that centres the values on zero.
SCALES: dict[TensorType, tuple[int, int | None, float]] = {
    TensorType.Q4_0: (0, None, 0),
    TensorType.Q4_1: (0, 2, -7.5),
    TensorType.Q5_0: (0, None, 0),
    TensorType.Q5_1: (0, 2, -15.5),
    TensorType.Q8_0: (0, None, 0),
    TensorType.Q2_K: (80, 82, 1.5),
    TensorType.Q3_K: (108, None, 0),
    TensorType.Q4_K: (0, 2, 7.5),
    TensorType.Q5_K: (0, 2, 15.5),
    TensorType.Q6_K: (208, None, 0),
    TensorType.IQ4_NL: (0, None, 0),
    TensorType.IQ4_XS: (0, None, 0),
}
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
CHUNK = 1 << 24  # values made at a time


class Weights:
    """Random tensors of any storage type."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.Generator(np.random.SFC64(seed))
        self.units: dict[TensorType, float] = {}  # standard deviation of blocks whose scales are around 1

    def make(self, type_: TensorType, rows: int, columns: int, deviation: float, mean: float = 0.0) -> Bytes:
        """(rows, bytes per row)"""
        row_bytes = type_.row_bytes(columns)
        data = np.empty((rows, row_bytes), dtype=np.uint8)
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            part = data[start : start + step]
            values = part.size // type_.block[1] * type_.block[0]
            made = (
                self._floats(type_, values, deviation, mean)
                if type_ in FLOATS
                else self._quantized(type_, values, deviation)
            )
            part[:] = made.reshape(part.shape)
        return data

    def _floats(self, type_: TensorType, count: int, deviation: float, mean: float) -> Bytes:
        values = (self.random.random(count, dtype=np.float32) - np.float32(0.5)) * np.float32(deviation * 12**0.5)
        values += np.float32(mean)
        if type_ is TensorType.F16:
            return values.astype(np.float16).view(np.uint8)
        if type_ is TensorType.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)

    def _quantized(self, type_: TensorType, count: int, deviation: float) -> Bytes:
        if type_ not in self.units:
            self.units[type_] = float(dequantize(self._blocks(type_, 1 << 12, 1.0).reshape(-1), type_).std())
        return self._blocks(type_, count // type_.block[0], deviation / self.units[type_])

    def _blocks(self, type_: TensorType, count: int, scale: float) -> Bytes:
        size = type_.block[1]
        blocks = np.frombuffer(self.random.bytes(count * size), np.uint8).reshape(count, size).copy()
        scale_at, minimum_at, factor = SCALES[type_]
        scales = self.random.uniform(0.5 * scale, 1.5 * scale, (count, 1)).astype(np.float16)
        blocks[:, scale_at : scale_at + 2] = scales.view(np.uint8)
        if minimum_at is not None:
            blocks[:, minimum_at : minimum_at + 2] = (scales * np.float16(factor)).view(np.uint8)
        if type_ in (TensorType.Q4_K, TensorType.Q5_K):  # each group's minimum is its scale
            blocks[:, 8:12] = blocks[:, 4:8]
            blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
        elif type_ is TensorType.Q2_K:
            blocks[:, :16] = (blocks[:, :16] & 15) * 17
        return blocks


def tensors(shape: Shape, type_: TensorType) -> Iterator[tuple[str, TensorType, tuple[int, ...], float, float]]:
    """(name, type, row-major shape, standard deviation, mean) of every tensor, in the file's order."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim

    def matrix(
        name: str, rows: int, columns: int, stored: TensorType = type_
    ) -> tuple[str, TensorType, tuple[int, ...], float, float]:
        return f"{name}.weight", fitting(stored, columns), (rows, columns), columns**-0.5, 0.0

    def vector(name: str, size: int, mean: float) -> tuple[str, TensorType, tuple[int, ...], float, float]:
        return name, TensorType.F32, (size,), 0.1, mean

    ends = type_ if type_ in FLOATS or type_ is TensorType.Q8_0 else TensorType.Q6_K
    yield matrix("token_embd", shape.vocabulary, hidden, ends)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield vector(f"{block}.attn_norm.weight", hidden, 1.0)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield matrix(f"{block}.attn_{name}", rows, hidden)
            if shape.bias:
                yield vector(f"{block}.attn_{name}.bias", rows, 0.0)
        yield matrix(f"{block}.attn_output", hidden, hidden)
        yield vector(f"{block}.ffn_norm.weight", hidden, 1.0)
        yield matrix(f"{block}.ffn_gate", shape.intermediate, hidden)
        yield matrix(f"{block}.ffn_up", shape.intermediate, hidden)
        yield matrix(f"{block}.ffn_down", hidden, shape.intermediate)
    yield vector("output_norm.weight", hidden, 1.0)
    if not shape.tied:
        yield matrix("output", shape.vocabulary, hidden, ends)


def fitting(type_: TensorType, columns: int) -> TensorType:
    """`type_`, or what llama.cpp falls back to for rows that are not a whole number of its blocks."""
    if columns % type_.block[0]:
        type_ = FALLBACKS.get(type_, TensorType.F16)
    return TensorType.F16 if columns % type_.block[0] else type_


def add_model(writer: gguf.GGUFWriter, shape: Shape, type_: TensorType) -> None:
    writer.add_name(f"random-{shape.architecture}-{shape.hidden}x{shape.layers}-{type_.name}")
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_quantization_version(2)


def add_synthetic_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte-level BPE with merges of every token with every byte, shortest first; two control tokens at the end."""
    alphabet = byte_alphabet()
    tokens, merges = list(alphabet), []
    for first in tokens:  # grows while it is walked
        joined = alphabet[: size - 2 - len(tokens)]
        merges += [f"{first} {letter}" for letter in joined]
        tokens += [first + letter for letter in joined]
        if len(tokens) == size - 2:
            break
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|begin|>", "<|end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes, the printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path, size: int) -> None:
    """The tokenizer of another GGUF file, padded with unused tokens."""
    for key, value in GGUFFile.open(source).metadata.items():
        if not key.startswith("tokenizer."):
            continue
        values = value if isinstance(value, (str, bool, int, float)) else list(value)
        if isinstance(values, list) and isinstance(value, np.ndarray):
            values = value.tolist()
        if key == "tokenizer.ggml.tokens":
            if len(values) > size:
                raise SystemExit(f"{source}: has {len(values)} tokens, more than the shape's {size}")
            values += [f"[PAD{i}]" for i in range(len(values), size)]
        elif key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            values += [int(gguf.TokenType.UNUSED) if key.endswith("type") else -1e4] * (size - len(values))
        add_value(writer, key, values)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, str(value))


def write(path: Path, shape: Shape, type_: TensorType, seed: int, tokenizer_from: Path | None) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    add_model(writer, shape, type_)
    if tokenizer_from is None:
        add_synthetic_tokenizer(writer, shape.vocabulary)
    else:
        copy_tokenizer(writer, tokenizer_from, shape.vocabulary)
    plan = list(tensors(shape, type_))
    for name, stored, sizes, _, _ in plan:
        row_bytes = stored.row_bytes(sizes[-1])
        byte_shape = (*sizes[:-1], row_bytes)
        size = int(np.prod(byte_shape))
        writer.add_tensor_info(
            name, byte_shape, np.dtype(np.uint8), size, raw_dtype=gguf.GGMLQuantizationType(int(stored))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = Weights(seed)
    for _, stored, sizes, deviation, mean in plan:
        rows = int(np.prod(sizes[:-1]))
        writer.write_tensor_data(weights.make(stored, rows, sizes[-1], deviation, mean))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file with random weights.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--type", choices=[t.name for t in (*FLOATS, *SCALES)], default="Q4_0")
    parser.add_argument("--layers", type=int, help="the number of layers, instead of the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-from", type=Path, metavar="FILE.gguf", help="copy this file's tokenizer")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        if arguments.layers < 1:
            parser.error(f"--layers {arguments.layers}: a model has at least one layer")
        shape = replace(shape, layers=arguments.layers)
    write(arguments.output, shape, TensorType[arguments.type], arguments.seed, arguments.tokenizer_from)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
