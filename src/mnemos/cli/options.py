"""Options that several commands share: which model, and how it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mnemos.errors import FormatError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.text.tokenizer import Tokenizer


def add_model_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """MODEL, and how it is run."""
    where = f" (default {default})" if default else ""
    text = f"a known name, hf:org/name[:file], a .gguf file or a Hugging Face folder{where}"
    parser.add_argument("model", metavar="MODEL", nargs="?" if default else None, default=default, help=text)
    group = parser.add_argument_group("running the model")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="native (default), torch, or numpy, the reference"
    )
    group.add_argument("--dtype", default="auto", metavar="TYPE", help="auto: weights as stored; float32: expanded")
    group.add_argument("--context", type=int, metavar="N", help="context length in tokens (default: the model's)")


def load_engine(arguments: argparse.Namespace) -> InferenceEngine:
    """The engine for `arguments.model`, fetched first if need be, with progress on standard error."""
    from mnemos.cli.terminal import ProgressBar
    from mnemos.engine.pretrained import load_parts

    with ProgressBar(arguments.model) as progress:
        parts = load_parts(
            arguments.model,
            backend=arguments.backend,
            dtype=arguments.dtype,
            context_length=arguments.context,
            draft=getattr(arguments, "draft", None),
            progress=progress,
        )
    from mnemos.engine.engine import InferenceEngine  # only now: weights are read meanwhile

    return InferenceEngine(**parts)


def tokenizer_of(engine: InferenceEngine, model: str) -> Tokenizer:
    """The engine's tokenizer; the model that `from_pretrained` loads always has one."""
    if engine.tokenizer is None:
        raise FormatError(f"{model} has no tokenizer")
    return engine.tokenizer
