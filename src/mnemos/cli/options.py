"""Options that several commands share: the model, and how it runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import Field
from typing import TYPE_CHECKING, Any

from mnemos.engine.options import LoadOptions, command_line, split
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
            add_option(group, row)


def add_draft_argument(parser: argparse._ActionsContainer) -> None:
    """Adds --draft, for a command that generates."""
    add_option(parser, next(row for row in command_line(LoadOptions) if row.name == "draft"))


def add_option(parser: argparse._ActionsContainer, row: Field[Any], note: str = "") -> None:
    """Adds an option, with a note after its help; if unset, it is None, so that its default is defined in one place."""
    flags = ["--" + row.name.replace("_", "-"), *(["--context"] if row.name == "context_length" else [])]
    kind, text, metavar = row.metadata["rule"].kind, row.metadata["help"] + note, row.metadata["metavar"]
    if kind == "flag":
        parser.add_argument(*flags, dest=row.name, action="store_true", default=None, help=text)
    elif kind == "list":
        text += "; may be repeated"
        parser.add_argument(*flags, dest=row.name, action="append", metavar=metavar, help=text)
    else:
        parse = {"integer": int, "number": float}.get(kind, str)
        parser.add_argument(*flags, dest=row.name, type=parse, metavar=metavar, help=text)


def given(arguments: argparse.Namespace, rows: Iterable[Field[Any]]) -> dict[str, Any]:
    """The values of the options that were set."""
    values = {row.name: getattr(arguments, row.name, None) for row in rows}
    return {name: value for name, value in values.items() if value is not None}


def add_session_dir(parser: argparse._ActionsContainer) -> None:
    """Adds --session-dir."""
    help = "the folder of sessions; by default one in the user's state folder"
    parser.add_argument("--session-dir", metavar="FOLDER", help=help)


def load_engine(arguments: argparse.Namespace, **running: Any) -> InferenceEngine:
    """The engine for `arguments.model`, fetched first if necessary, with progress on standard error.

    running: further options of the engine.
    """
    return load(arguments.model, {**given(arguments, command_line(LoadOptions)), **running})


def load(source: str, options: Mapping[str, Any]) -> InferenceEngine:
    """The engine for a model with these options of `from_pretrained`, with progress on standard error."""
    from mnemos.cli.terminal import ProgressBar
    from mnemos.engine.pretrained import load_parts

    with ProgressBar(source) as progress:
        loading, running = split({**options, "progress": progress})
        parts = load_parts(source, loading)
    from mnemos.engine.engine import InferenceEngine  # imported late, while the weights are being read

    return InferenceEngine(**parts, **running)


def tokenizer_of(engine: InferenceEngine, model: str) -> Tokenizer:
    """The engine's tokenizer; the model that `from_pretrained` loads always has one."""
    if engine.tokenizer is None:
        raise FormatError(f"{model} has no tokenizer")
    return engine.tokenizer
