"""`mnemos serve`: a server for one or several models."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from concurrent.futures import Future
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.cli.options import add_draft_argument, add_loading_arguments, add_option, given, load
from mnemos.engine.options import LoadOptions, command_line
from mnemos.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.serve.catalogue import Offer
    from mnemos.serve.config_file import ServerFile

UNIT = """[Unit]
Description=Mnemos, a language model server
After=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
TimeoutStopSec={stop}
DynamicUser=yes
CacheDirectory=mnemos
Environment=MNEMOS_HOME=%C/mnemos
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _need_the_extra()
    from mnemos.serve.settings import Settings

    parser.usage = "mnemos serve MODEL [MODEL ...] [options]"
    text = "a known name, hf:org/name[:file], a .gguf file or a Hugging Face folder; NAME=MODEL serves it as NAME"
    parser.add_argument("models", metavar="MODEL", nargs="*", help=text)
    parser.add_argument("--config", metavar="FILE", help="a TOML file with settings and models; options here win")
    parser.add_argument("--default", metavar="NAME", help="the model of requests that name none (a single one is)")
    parser.add_argument(
        "--alias", metavar="ALIAS=NAME", action="append", default=[], help="another name of a model; may be repeated"
    )
    parser.add_argument("--keep-alive", metavar="S", type=float, help="unload models after S seconds without requests")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="API keys, a line each or in TOML; MNEMOS_API_KEY holds a single one"
    )
    parser.add_argument("--systemd", action="store_true", help="print a systemd unit that runs this command, and exit")
    group = parser.add_argument_group("server")
    for row in fields(Settings):
        add_option(group, row, "" if row.default in ((), False, None) else f" (default {row.default})")
    running = parser.add_argument_group("running the models")
    add_loading_arguments(running)
    add_draft_argument(running)
    parser.epilog = (
        "examples:\n"
        "  mnemos serve smollm2-135m\n"
        "  mnemos serve small=smollm2-135m qwen3.gguf --default small --keep-alive 600\n"
        "  mnemos serve --config server.toml\n\n"
        "then, with any OpenAI client, or:\n"
        '  curl localhost:8000/v1/chat/completions -d \'{"messages": [{"role": "user", "content": "Hello"}]}\''
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.serve.catalogue import Catalogue
    from mnemos.serve.keys import Keys
    from mnemos.serve.logs import set_up
    from mnemos.serve.settings import Settings

    file = _file(arguments.config)
    settings = Settings(**{**(file.settings if file else {}), **given(arguments, fields(Settings))})
    if arguments.systemd:
        words = [word for word in sys.argv[1:] if word != "--systemd"]
        print(UNIT.format(command=" ".join([sys.argv[0], *words]), stop=round(settings.grace) + 10))
        return 0
    key = os.environ.get("MNEMOS_API_KEY")
    path = arguments.api_key_file or (file.api_key_file if file else None)
    keys = Keys([key] if key else [], settings.share_cache, path)
    offers = [*(file.offers if file else []), *(_offer(text, arguments) for text in arguments.models)]
    if not offers:
        raise ConfigError("there is no model to serve; name one, such as smollm2-135m, or give --config FILE")
    offers = _with_aliases([_checked(offer, arguments.keep_alive) for offer in offers], arguments.alias)
    default = arguments.default or (file.default if file else None)
    offers = _started(offers, default)
    from mnemos.serve.application import app  # imported late: the weights are being read meanwhile
    from mnemos.serve.run import address, listen, serve, warning

    catalogue = Catalogue(offers, default)
    set_up(settings.log_format == "json")
    listener = listen(settings)
    application = app(catalogue, settings=settings, keys=keys)
    loud = warning(settings, bool(keys))
    if loud:
        print(f"mnemos: warning: {loud}", file=sys.stderr)

    def say_ready() -> None:
        print(f"mnemos: ready at {address(listener, settings)}  (Ctrl-C stops)", file=sys.stderr, flush=True)

    serve(application, listener, say_ready)
    return 0


def _need_the_extra() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed; the server needs it: pip install 'mnemos[serve]'")


def _file(path: str | None) -> ServerFile | None:
    if path is None:
        return None
    from mnemos.serve.config_file import read_server_file

    return read_server_file(Path(path), _load)


def _offer(text: str, arguments: argparse.Namespace) -> Offer:
    """The offer of a model named on the command line, as MODEL or NAME=MODEL."""
    from mnemos.serve.config_file import offer

    name, equals, source = text.partition("=")
    options = given(arguments, command_line(LoadOptions))
    return offer(source if equals else text, name if equals else None, options, _load)


def _load(source: str, **options: Any) -> InferenceEngine:
    return load(source, options)


def _checked(offer: Offer, keep_alive: float | None) -> Offer:
    """The offer with its keep-alive time. FormatError now rather than later if its file does not exist."""
    from mnemos.hub.known_models import KNOWN_MODELS
    from mnemos.hub.sources import resolve

    source = offer.source or offer.name
    if source not in KNOWN_MODELS and not source.startswith("hf:"):
        resolve(source)
    return offer if keep_alive is None else replace(offer, keep_alive=keep_alive)


def _started(offers: list[Offer], default: str | None) -> list[Offer]:
    """The offers, of which the one that is loaded first is being loaded already, in a thread of its own."""
    first = 0 if len(offers) == 1 else next((n for n, one in enumerate(offers) if one.name == default), None)
    if first is None:
        return offers
    make = offers[first].make
    started: list[Future[InferenceEngine]] = [Future()]
    future = started[0]

    def load() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=load, daemon=True).start()
    ahead = replace(offers[first], make=lambda: started.pop().result() if started else make())
    return [*offers[:first], ahead, *offers[first + 1 :]]


def _with_aliases(offers: list[Offer], aliases: list[str]) -> list[Offer]:
    for text in aliases:
        alias, equals, name = text.partition("=")
        position = next((n for n, offer in enumerate(offers) if offer.name == name), None)
        if not equals or position is None:
            names = ", ".join(offer.name for offer in offers)
            raise ConfigError(f"alias is {text!r}; it must be ALIAS=NAME with one of the models {names}")
        offers[position] = replace(offers[position], aliases=(*offers[position].aliases, alias))
    return offers
