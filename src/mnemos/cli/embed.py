"""`mnemos embed`: vectors of texts."""

from __future__ import annotations

import argparse
import json
import sys

from mnemos.cli.options import add_model_arguments, load_engine, tokenizer_of
from mnemos.engine.embedding import POOLING
from mnemos.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos embed MODEL [TEXT ...] [options]"
    add_model_arguments(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="the texts (default: the lines of standard input)")
    parser.add_argument(
        "--pooling", choices=POOLING.names, default="mean", help="of all tokens' hidden states or the last one's"
    )
    parser.add_argument(
        "--no-normalize", action="store_true", help="keep the vectors' lengths instead of making them 1"
    )
    parser.epilog = (
        "Prints one JSON array for each text, in their order.\n\n"
        "examples:\n"
        '  mnemos embed smollm2-135m "a text" "another one"\n'
        "  mnemos embed model.gguf --pooling last < lines.txt"
    )


def run(arguments: argparse.Namespace) -> int:
    texts = arguments.texts or [line for line in sys.stdin.read().splitlines() if line]
    if not texts:
        raise ConfigError("there are no texts; give them after the model, or as lines of standard input")
    with load_engine(arguments) as engine:
        tokenizer_of(engine, arguments.model)
        for vector in engine.embed(texts, arguments.pooling, not arguments.no_normalize):
            print(json.dumps([float(str(value)) for value in vector]))  # no more digits than float32 has
    return 0
