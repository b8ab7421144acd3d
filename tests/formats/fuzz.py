"""Mutates real model files for as long as you like, and checks that they are read or refused, never worse.

    python -m tests.formats.fuzz --minutes 10 model.gguf vocabulary.gguf model.safetensors

A finding (an exception that is no MnemosError, more memory than the file's size allows, more than a few seconds) is
printed with the seed that reproduces it.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.errors import MnemosError
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.safetensors import open_safetensors
from mnemos.formats.string_array import StringArray
from mnemos.formats.tensor import Tensor

EXTREMES = [0, 1, 7, 8, 31, 32, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
MEMORY_SHARE = 2  # opening may allocate this many times the file's size (offsets of the shortest strings) and
MEMORY_BASE = 4 << 20  # plus this much
SECONDS = 5.0


def open_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(metadata, tensors)"""
    if path.suffix == ".safetensors":
        return {}, open_safetensors(path)
    file = GGUFFile.open(path)
    return file.metadata, file.tensors


def read_all(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for value in metadata.values():
        if isinstance(value, StringArray):
            value.joined()
            read_strings(value)
        elif isinstance(value, np.ndarray):
            value.tolist()
    for tensor in tensors.values():
        check_tensor(tensor)


def read_strings(array: StringArray) -> None:
    """Text may be invalid UTF-8, which only shows when it is decoded."""
    try:
        array.strings()
    except MnemosError:
        return


def check_tensor(tensor: Tensor) -> None:
    assert len(tensor.data) == tensor.rows * tensor.type.row_bytes(tensor.columns)
    assert tensor.dequantize().shape == tensor.shape


def mutate(content: bytes, generator: random.Random, first: int, within: int) -> list[tuple[int, bytes]]:
    """Patches (offset, bytes) that begin in content[first:within]."""
    patches = []
    for _ in range(generator.choice([1, 1, 1, 2, 3, 8])):
        at = generator.randrange(first, within)
        kind = generator.randrange(5)
        if kind == 0:
            patch = bytes([content[at] ^ 1 << generator.randrange(8)])
        elif kind == 1:
            patch = bytes([generator.randrange(256)])
        elif kind == 2:
            patch = struct.pack("<Q", generator.choice(EXTREMES))[: generator.choice([4, 8])]
        elif kind == 3:
            source = generator.randrange(first, within)
            patch = bytes(content[source : source + generator.randrange(1, 64)])
        else:
            number = int.from_bytes(content[at : at + 8], "little") + generator.choice([-32, -8, -1, 1, 8, 32])
            patch = struct.pack("<Q", number % 2**64)
        patches.append((at, patch[: len(content) - at]))
    return patches


def structure(path: Path) -> int:
    """How many bytes at the start of the file are structure rather than weights."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return min(8 + int.from_bytes(file.read(8), "little"), size)
    tensors = GGUFFile.open(path).tensors
    return size - sum(len(t.data) for t in tensors.values()) if tensors else size


class Target:
    """A copy of a real file that is patched in place and restored; its weights are left out (zeros)."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.path = folder / source.name
        self.within = structure(source)
        self.size = source.stat().st_size
        with source.open("rb") as file:
            self.head = file.read(self.within + 64)
        self.heal()

    def heal(self) -> None:
        with self.path.open("wb") as file:
            file.write(self.head)
            file.truncate(self.size)

    def run(self, seed: int) -> str:
        """One mutation: "opened" or the error's class; any other exception is a finding."""
        generator = random.Random(seed)
        # Most structure is vocabulary; aim at the small rest most of the time.
        first = generator.choice([0, 0, max(0, self.within - 20_000)])
        within = generator.choice([self.within, min(self.within, first + 4096)])
        patches = mutate(self.head, generator, first, within)
        cut = generator.randrange(self.size) if generator.random() < 0.02 else self.size
        with self.path.open("r+b") as file:
            for at, patch in patches:
                file.seek(at)
                file.write(patch)
            if cut < self.size:
                file.truncate(cut)
        try:
            return self.judge(thorough=generator.random() < 0.1 or self.size < 1 << 16)
        finally:
            if cut < self.size:
                self.heal()
            with self.path.open("r+b") as file:
                for at, patch in patches:
                    file.seek(at)
                    file.write(self.head[at : at + len(patch)])

    def judge(self, thorough: bool) -> str:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        start = time.thread_time()
        try:
            opened = open_file(self.path)
            result = "opened"
        except MnemosError as error:
            assert str(self.path) in str(error), f"the message does not name the file: {error}"
            assert len(str(error)) < 2000, "the message is too long"
            return type(error).__name__
        finally:
            seconds = time.thread_time() - start
            peak = tracemalloc.get_traced_memory()[1] - before
            assert seconds < SECONDS, f"took {seconds:.1f} s"
            assert peak < MEMORY_SHARE * self.size + MEMORY_BASE, f"allocated {peak} bytes for a file of {self.size}"
        if thorough:
            read_all(*opened)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tracemalloc.start()
    end = time.monotonic() + 60 * arguments.minutes
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        targets = [Target(file, Path(folder)) for file in arguments.files]
        seed = arguments.seed
        while time.monotonic() < end:
            target = targets[seed % len(targets)]
            try:
                counts[target.run(seed)] += 1
            except Exception:
                counts["findings"] += 1
                traceback.print_exc()
                print(f"seed {seed}, {target.path.name}", flush=True)
            seed += 1
    print(f"{seed - arguments.seed} mutations: {dict(counts)}")


if __name__ == "__main__":
    main()
