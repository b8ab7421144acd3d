"""Options that several commands share: the model, and how it runs."""

from __future__ import annotations

import argparse
from dataclasses import Field
from typing import TYPE_CHECKING, Any

from mnemos.engine.options import LoadOptions, command_line
from mnemos.errors import FormatError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.text.tokenizer import Tokenizer


def add_model_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Adds MODEL and the options for running it."""
    where = f" (default {default})" if default else ""
    text = f"a known name, hf:org/name[:file], a .gguf file or a Hugging Face folder{where}"
    parser.add_argument("model", metavar="MODEL", nargs="?" if default else None, default=default, help=text)
    add_loading_arguments(parser.add_argument_group("running the model"))


def add_loading_arguments(group: argparse._ActionsContainer) -> None:
    """Adds the options for loading and running a model, except --draft."""
    for row in command_line(LoadOptions):
        if row.name != "draft":
            _add_option(group, row)


def add_draft_argument(parser: argparse._ActionsContainer) -> None:
    """Adds --draft, for a command that generates."""
    _add_option(parser, next(row for row in command_line(LoadOptions) if row.name == "draft"))


def _add_option(parser: argparse._ActionsContainer, row: Field[Any]) -> None:
    """Adds a loading option; if unset, it stays None, so that its default is defined in one place."""
    flags = ["--" + row.name.replace("_", "-"), *(["--context"] if row.name == "context_length" else [])]
    kind, text, metavar = row.metadata["rule"].kind, row.metadata["help"], row.metadata["metavar"]
    if kind == "flag":
        parser.add_argument(*flags, dest=row.name, action="store_true", default=None, help=text)
    else:
        parse = int if kind == "integer" else str
        parser.add_argument(*flags, dest=row.name, type=parse, metavar=metavar, help=text)


def load_engine(arguments: argparse.Namespace) -> InferenceEngine:
    """The engine for `arguments.model`, fetched first if necessary, with progress on standard error."""
    from mnemos.cli.terminal import ProgressBar
    from mnemos.engine.pretrained import load_parts

    values = {row.name: getattr(arguments, row.name, None) for row in command_line(LoadOptions)}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    with ProgressBar(arguments.model) as progress:
        parts = load_parts(arguments.model, LoadOptions(**given, progress=progress))
    from mnemos.engine.engine import InferenceEngine  # imported late, while the weights are being read

    return InferenceEngine(**parts)


def tokenizer_of(engine: InferenceEngine, model: str) -> Tokenizer:
    """The engine's tokenizer; the model that `from_pretrained` loads always has one."""
    if engine.tokenizer is None:
        raise FormatError(f"{model} has no tokenizer")
    return engine.tokenizer
