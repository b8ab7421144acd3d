"""Compares the native tokenizers with the `tokenizers` library on random texts, for every kind that both know.

    PYTHONPATH=src:. python tools/fuzz_tokenizers.py --texts 1000000 [--seed 1] [vocabulary.gguf ...]

Each text goes to the next of all tokenizers: small ones trained here, with every normalizer and pre-tokenizer, and
those of the GGUF files, the first of them with all of GGUF's pre-tokenizers. Prints what differs, and how many do.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.text.oracle import (
    PIECES,
    Pair,
    file_pair,
    gguf_pair,
    make_models,
    random_text,
    sentencepiece_metadata,
    variants,
)

from mnemos.formats.gguf import GGUFFile
from mnemos.text.pretokenizers import PRE_TOKENIZERS


def make_pairs(files: list[Path], folder: Path) -> list[Pair]:
    """All tokenizers."""
    chance = random.Random(0)
    texts = [random_text(chance) for _ in range(300)] + [" ".join(PIECES), *PIECES]
    texts += [Path(__file__).read_text(encoding="utf-8"), *("the hello word don't " + piece for piece in PIECES)]
    pairs = [file_pair(name, tokenizer, folder) for name, tokenizer in variants(make_models(texts))]
    for kind in ("bpe", "unigram"):
        pairs.append(gguf_pair(f"sentencepiece-{kind}", sentencepiece_metadata(folder, kind, texts)))
    for index, file in enumerate(files):
        metadata = dict(GGUFFile.open(file).metadata)
        pairs.append(gguf_pair(file.name, metadata))
        styles = {style: name for name, style in PRE_TOKENIZERS.items() if style.byte_level and index == 0}
        for name in styles.values():
            pairs.append(gguf_pair(name, {**metadata, "tokenizer.ggml.pre": name}))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(arguments.files, Path(folder))
        print(f"{len(pairs)} tokenizers, {arguments.texts} texts, seed {arguments.seed}", flush=True)
        chance = random.Random(arguments.seed)
        different: Counter[str] = Counter()
        begin = time.perf_counter()
        for index in range(arguments.texts):
            pair = pairs[index % len(pairs)]
            difference = pair.difference(random_text(chance))
            if difference:
                different[pair.name] += 1
                if different[pair.name] <= 2:
                    print(difference, flush=True)
        seconds = time.perf_counter() - begin
        print(f"{different.total()} of {arguments.texts} texts differ {dict(different)}, in {seconds:.0f} s")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
