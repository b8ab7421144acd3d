"""`mnemos serve`: a server for one or several models."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.cli.options import add_draft_argument, add_loading_arguments
from mnemos.engine.options import LoadOptions, command_line
from mnemos.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from mnemos.serve.catalogue import Offer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mnemos.serve.settings import Settings

    parser.usage = "mnemos serve MODEL [MODEL ...] [options]"
    text = "a known name, hf:org/name[:file], a .gguf file or a Hugging Face folder; NAME=MODEL serves it as NAME"
    parser.add_argument("models", metavar="MODEL", nargs="+", help=text)
    parser.add_argument("--default", metavar="NAME", help="the model of requests that name none")
    parser.add_argument("--keep-alive", metavar="S", type=float, help="unload models after S seconds without requests")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="a file with an API key a line; MNEMOS_API_KEY holds a single one"
    )
    group = parser.add_argument_group("server")
    for one in fields(Settings):
        rule, metavar = one.metadata["rule"], one.metadata["metavar"]
        how: dict[str, Any] = {
            "help": f"{one.metadata['help']}" + ("" if one.default in ((), False) else f" (default {one.default})")
        }
        if rule.kind == "flag":
            how |= {"action": "store_true", "default": None}
        else:
            how |= {"type": {"integer": int, "number": float}.get(rule.kind, str), "metavar": metavar}
            if rule.kind == "list":
                how["action"] = "append"
        group.add_argument("--" + one.name.replace("_", "-"), **how)
    running = parser.add_argument_group("running the models")
    add_loading_arguments(running)
    add_draft_argument(running)
    parser.epilog = (
        "examples:\n"
        "  mnemos serve smollm2-135m\n"
        '  curl localhost:8000/v1/chat/completions -d \'{"messages": [{"role": "user", "content": "Hello"}]}\'\n'
        "  mnemos serve small=smollm2-135m qwen3.gguf --default small --keep-alive 600"
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        from mnemos.serve.app import app
        from mnemos.serve.run import address, listen, serve, warning
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mnemos"):
            raise
        raise MissingDependencyError(
            f"{error.name} is not installed; the server needs it: pip install 'mnemos[serve]'"
        ) from error
    from mnemos.serve.catalogue import Catalogue
    from mnemos.serve.keys import Keys
    from mnemos.serve.settings import Settings

    values = {one.name: getattr(arguments, one.name) for one in fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if value is not None})
    keys = Keys(_keys(arguments.api_key_file), settings.share_cache)
    catalogue = Catalogue([_offer(text, arguments) for text in arguments.models], arguments.default)
    listener = listen(settings)
    application = app(catalogue, settings=settings, keys=keys)
    loud = warning(settings, bool(keys))
    if loud:
        print(f"mnemos: warning: {loud}", file=sys.stderr)
    serve(
        application,
        listener,
        lambda: print(f"mnemos: ready at {address(listener)}  (Ctrl-C stops)", file=sys.stderr, flush=True),
    )
    return 0


def _offer(text: str, arguments: argparse.Namespace) -> Offer:
    from mnemos.serve.catalogue import FOREVER, Offer

    name, equals, source = text.partition("=")
    if not equals:
        source = text
        name = Path(text).name.removesuffix(".gguf") if os.sep in text or text.endswith(".gguf") else text
    options = {row.name: getattr(arguments, row.name, None) for row in command_line(LoadOptions)}
    given = {key: value for key, value in options.items() if value is not None}

    def make() -> Any:
        from mnemos.engine.engine import InferenceEngine

        return InferenceEngine.from_pretrained(source, **given)

    keep_alive = FOREVER if arguments.keep_alive is None else arguments.keep_alive
    return Offer(name, make, keep_alive=keep_alive, source=source)


def _keys(path: str | None) -> list[str]:
    keys = [os.environ["MNEMOS_API_KEY"]] if os.environ.get("MNEMOS_API_KEY") else []
    if path is not None:
        keys += [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not keys:
            raise ConfigError(f"{path} has no keys; write one a line")
    return keys
