"""Small GGUF and safetensors files, built byte by byte so that tests can make every part of them wrong."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = "BbHhIif?--Qqd"


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: Any, items: int = U32) -> bytes:
    """A key-value pair; an array's items are of the kind `items`."""
    head = string(key) + struct.pack("<I", kind)
    if kind == STRING:
        return head + string(value)
    if kind == ARRAY:
        packed = b"".join(string(x) if items == STRING else struct.pack("<" + LETTERS[items], x) for x in value)
        return head + struct.pack("<IQ", items, len(value)) + packed
    return head + struct.pack("<" + LETTERS[kind], value)


def info(name: str | bytes, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor info; dimensions as in the file, fastest first."""
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@dataclass
class SmallGGUF:
    """A GGUF file in pieces; by default a valid one with every kind of value and two tensors."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(
        default_factory=lambda: [
            pair("general.architecture", STRING, "llama"),
            pair("llama.block_count", U32, 2),
            pair("llama.rope.freq_base", F32, 10000.0),
            pair("tokenizer.ggml.add_bos_token", BOOL, True),
            pair("tokenizer.ggml.tokens", ARRAY, ["a", "", "ä€", "x" * 300], STRING),
            pair("tokenizer.ggml.scores", ARRAY, [0.5, -1.0, 2.0, 0.0], F32),
            pair("some.flags", ARRAY, [True, False], BOOL),
            pair("some.empty", ARRAY, [], STRING),
            pair("some.byte", I8, -3),
            pair("some.large", U64, 2**63),
        ]
    )
    infos: list[bytes] = field(default_factory=lambda: [info("a", (32, 2), 2, 0), info("b", (3,), 0, 64)])
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32
    data: bytes = bytes(range(36)) + bytes(28) + struct.pack("<3f", 1, 2, 3)

    def build(self) -> bytes:
        tensors = len(self.infos) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, pairs) + b"".join(self.pairs + self.infos)
        return head + bytes(-len(head) % self.alignment) + self.data


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; a header that is not bytes is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def small_safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "h": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "mask": {"dtype": "BOOL", "shape": [1, 2], "data_offsets": [32, 34]},
        "none": {"dtype": "F16", "shape": [0, 5], "data_offsets": [34, 34]},
    }
    return safetensors(header, struct.pack("<6f", *range(6)) + struct.pack("<4H", *[0x3F80] * 4) + b"\x01\x00")
