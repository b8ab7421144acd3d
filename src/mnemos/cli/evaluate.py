"""`mnemos eval`: perplexity of a text."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.options import add_model_arguments, load_engine, tokenizer_of
from mnemos.cli.terminal import ProgressBar
from mnemos.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine

CHUNK = 512  # or the model's context, if that is shorter
LARGEST_EXPONENT = 700.0  # a float can still represent its exponential


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos eval MODEL FILE [options]"
    add_model_arguments(parser)
    parser.add_argument("file", metavar="FILE", help="a text file in UTF-8")
    parser.add_argument("--chunk", type=int, metavar="N", help=f"tokens per chunk (default {CHUNK})")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    parser.epilog = (
        "The text's tokens are cut into non-overlapping chunks; each token except a chunk's first is scored, given\n"
        "those before it in the chunk. Perplexity is exp of the mean negative log likelihood.\n\n"
        "examples:\n"
        "  mnemos eval smollm2-135m book.txt\n"
        "  mnemos eval model.gguf book.txt --chunk 1024 --dtype float32 --json"
    )


def run(arguments: argparse.Namespace) -> int:
    text = _read(Path(arguments.file))
    with load_engine(arguments) as engine:
        token_ids = tokenizer_of(engine, arguments.model).encode(text, add_special=False, parse_special=False)
        longest = engine.spec.context_length
        size = min(CHUNK, longest) if arguments.chunk is None else arguments.chunk
        chunks = _cut(token_ids, size, longest, arguments.file)
        total, scored = 0.0, 0
        with ProgressBar(arguments.file, unit="tokens") as progress:
            for log_likelihood, count, done in _score(engine, chunks):
                total -= log_likelihood
                scored += count
                progress.note = f"perplexity {_perplexity(total / scored):.2f}"
                progress("scoring", done, len(token_ids))
    mean = total / scored
    if arguments.json:
        figures = {"tokens": scored, "negative_log_likelihood": mean, "perplexity": _perplexity(mean)}
        print(json.dumps({"file": arguments.file, "chunk": size, **figures}))
    else:
        print(f"perplexity {_perplexity(mean):.4f} (mean negative log likelihood {mean:.5f} over {scored} tokens)")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _perplexity(mean: float) -> float:
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


def _cut(token_ids: list[int], size: int, longest: int, file: str) -> list[list[int]]:
    if not 2 <= size <= longest:
        raise ConfigError(f"--chunk is {size}; it must be from 2 to {longest}, the model's context")
    chunks = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    scorable = [chunk for chunk in chunks if len(chunk) > 1]
    if not scorable:
        raise ConfigError(f"{file} has {len(token_ids)} tokens; at least 2 are needed")
    return scorable


def _score(engine: InferenceEngine, chunks: list[list[int]]) -> Iterator[tuple[float, int, int]]:
    """Yields, for each chunk, its log likelihood, its number of scored tokens, and the tokens done so far."""
    done = 0
    for chunk in chunks:
        (score,) = engine.score([chunk])
        done += len(chunk)
        yield math.fsum(score.logprobs.tolist()), len(score.logprobs), done
