"""`mnemos eval`: perplexity of a text."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from mnemos.cli.options import add_model_arguments, load_engine
from mnemos.cli.terminal import ProgressBar
from mnemos.errors import ConfigError, FormatError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos eval MODEL FILE [options]"
    add_model_arguments(parser)
    parser.add_argument("file", metavar="FILE", help="a text file in UTF-8")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens in a chunk (default 512)")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    parser.epilog = (
        "The text's tokens are cut into chunks that do not overlap; each token but a chunk's first is scored, given\n"
        "those before it in its chunk. Perplexity is exp of the mean negative log likelihood.\n\n"
        "examples:\n"
        "  mnemos eval smollm2-135m book.txt\n"
        "  mnemos eval model.gguf book.txt --chunk 1024 --dtype float32 --json"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.bench.perplexity import score_chunks

    text = _read(Path(arguments.file))
    with load_engine(arguments) as engine:
        longest = engine.model.spec.context_length
        if not 2 <= arguments.chunk <= longest:
            raise ConfigError(f"--chunk is {arguments.chunk}; it must be from 2 to {longest}, the model's context")
        token_ids = engine.tokenizer.encode(text, add_special=False, parse_special=False)
        if len(token_ids) < 2:
            raise ConfigError(f"{arguments.file} has {len(token_ids)} tokens; at least 2 are needed")
        total = scored = 0.0
        with ProgressBar(arguments.file, unit="tokens") as progress:
            for likelihoods, done in score_chunks(engine, token_ids, arguments.chunk):
                total -= math.fsum(likelihoods)
                scored += len(likelihoods)
                progress.note = f"perplexity {math.exp(total / scored):.2f}"
                progress("scoring", done, len(token_ids))
    mean = total / scored
    if arguments.json:
        figures = {"tokens": int(scored), "negative_log_likelihood": mean, "perplexity": math.exp(mean)}
        print(json.dumps({"file": arguments.file, "chunk": arguments.chunk, **figures}))
    else:
        print(f"perplexity {math.exp(mean):.4f} (mean negative log likelihood {mean:.5f} over {scored:.0f} tokens)")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
