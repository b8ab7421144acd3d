"""What a long text takes with a memory: resident bytes, and the speed of reading and of decoding at its end.

    python benchmarks/tiered_memory.py smollm2-135m --lengths 4096,131072 --memory window=512,recall=480,sinks=32

A short text is read; longer ones are made of mixtures of its pages, no two the same, written as if they had been read,
so that a large length takes seconds. Each length runs in a process of its own. Resident bytes are the operating
system's, after pages have left memory, and include the index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mnemos import Memory
from mnemos.contract import Batch
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.hub.sources import resolve
from mnemos.memory.policy import remember
from mnemos.models.load import LoadedModel, load_model

PAGE, CHUNK, READ, DECODED = 32, 512, 1024, 48


def batch(tokens: np.ndarray, start: int, groups: int) -> Batch:
    """One step that evaluates `tokens` from position `start` on, in pages 0, 1, 2, ... of every layer group."""
    pages = np.arange(-(-(start + len(tokens)) // PAGE), dtype=np.int32)
    return Batch(
        token_ids=tokens.astype(np.int32),
        positions=np.arange(start, start + len(tokens), dtype=np.int32),
        sequence_starts=np.array([0, len(tokens)], dtype=np.int32),
        pages=np.tile(pages, groups),
        page_positions=np.tile(PAGE * pages, groups),
        page_starts=(len(pages) * np.arange(groups + 1)).astype(np.int32),
        logit_rows=np.array([len(tokens) - 1], dtype=np.int32),
    )


def run(model: LoadedModel, tokens: np.ndarray, start: int, chunk: int) -> float:
    """Positions a second."""
    began, groups = time.perf_counter(), len(model.spec.layout.groups)
    for at in range(0, len(tokens), chunk):
        model.forward(batch(tokens[at : at + chunk], start + at, groups))
    return len(tokens) / (time.perf_counter() - began)


class Mixer:
    """Makes contents of pages out of those of pages that were read."""

    def __init__(self, contents: list[np.ndarray]) -> None:
        self._words = [content.view(np.uint32) for content in contents]
        self._chance = np.random.default_rng(2)
        self._shares = self._chance.random(2 * len(self._words[0]))

    def content(self) -> np.ndarray:
        """One page's numbers, up to half of them replaced by another one's."""
        one, other = self._chance.choice(len(self._words), 2, replace=False)
        count = len(self._words[0])
        at = self._chance.integers(count)
        replaced = self._shares[at : at + count] < self._chance.uniform(0, 0.5)
        return np.where(replaced, self._words[other], self._words[one]).view(np.uint8)


def resident() -> int:
    """Bytes that the process has in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def measure(name: str, length: int, memory: Memory | None) -> str:
    """One line of the table."""
    model = load_model(open_checkpoint(resolve(name)))
    if memory is not None:
        remember(model, memory, max(length, model.spec.context_length))
    model.reserve(-(-length // PAGE) + 1)
    tokens = np.random.default_rng(1).integers(0, model.spec.vocabulary_size, 4096)
    begin = (length - READ - DECODED) // PAGE * PAGE
    read = min(begin, len(tokens) - READ)
    run(model, tokens[:read], 0, CHUNK)
    cache = model.cache
    for group in range(len(model.spec.layout.groups)):
        mixer = Mixer([cache.read(page, group) for page in range(1, 17)])
        for page in range(read // PAGE, begin // PAGE):
            cache.write(page, mixer.content(), group)
        del mixer
    reading = run(model, tokens[-READ:], begin, CHUNK)
    decoding = run(model, tokens[:DECODED], begin + READ, 1)
    where = "all in memory" if memory is None else str(memory)
    return f"{length:8d}  {resident() / 2**20:9.0f}  {reading:9.0f}  {decoding:9.1f}  {where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="4096,131072", help="of the text, before what is read and decoded")
    parser.add_argument("--memory", default="default", help="a policy, or none")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(given.model, given.one, None if given.memory == "none" else Memory.read(given.memory)))
        return
    print("  length   resident MB  read tok/s  decode tok/s")
    for length in given.lengths.split(","):
        subprocess.run([sys.executable, __file__, given.model, "--one", length, "--memory", given.memory], check=True)


if __name__ == "__main__":
    main()
