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

from mnemos.cli.options import add_draft_argument, add_loading_arguments, add_option, add_session_dir, given, load
from mnemos.engine.options import LoadOptions, command_line
from mnemos.errors import ConfigError, MissingDependencyError, MnemosError

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine
    from mnemos.serve.catalogue import Offer
    from mnemos.serve.config_file import ServerFile
    from mnemos.serve.keys import Keys
    from mnemos.serve.run import Application
    from mnemos.serve.settings import Settings

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
    parser.add_argument(
        "--lora-modules", metavar="NAME=FOLDER", action="append", default=[],
        help="a LoRA adapter beside the model, for requests that name it as their model; may be repeated",
    )  # fmt: skip
    parser.add_argument("--keep-alive", metavar="S", type=float, help="unload models after S seconds without requests")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="API keys, a line each or in TOML; MNEMOS_API_KEY holds a single one"
    )
    parser.add_argument(
        "--replicas",
        metavar="N",
        type=int,
        default=1,
        help="server processes, each on a share of the cores (default 1)",
    )
    parser.add_argument("--systemd", action="store_true", help="print a systemd unit that runs this command, and exit")
    group = parser.add_argument_group("server")
    for row in fields(Settings):
        add_option(group, row, "" if row.default in ((), False, None) else f" (default {row.default})")
    running = parser.add_argument_group("running the models")
    add_loading_arguments(running)
    add_draft_argument(running)
    add_session_dir(running)
    help = "keep the answers of the latest N requests for others that are the same"
    running.add_argument("--response-cache", metavar="N", type=int, help=help)
    parser.epilog = (
        "examples:\n"
        "  mnemos serve smollm2-135m\n"
        "  mnemos serve small=smollm2-135m qwen3.gguf --default small --keep-alive 600\n"
        "  mnemos serve --config server.toml\n"
        "  mnemos serve smollm2-135m --replicas 2\n\n"
        "then, with any OpenAI client, or:\n"
        '  curl localhost:8000/v1/chat/completions -d \'{"messages": [{"role": "user", "content": "Hello"}]}\''
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.serve.logs import set_up
    from mnemos.serve.settings import Settings

    file = _file(arguments.config)
    settings = Settings(**{**(file.settings if file else {}), **given(arguments, fields(Settings))})
    if arguments.systemd:
        words = [word for word in sys.argv[1:] if word != "--systemd"]
        print(UNIT.format(command=" ".join([sys.argv[0], *words]), stop=round(settings.grace) + 10))
        return 0
    if arguments.replicas < 1:
        raise ConfigError(f"replicas is {arguments.replicas}; it must be a whole number of at least 1")
    if arguments.replicas > 1:
        return _run_replicas(arguments, file, settings)
    keys = _keys(arguments, file, settings)
    offers, default = _offers(arguments, file)
    offers = _started(offers, default)
    from mnemos.serve.application import app  # imported late: the weights are being read meanwhile
    from mnemos.serve.catalogue import Catalogue

    set_up(settings.log_format == "json")
    _listen_and_serve(app(Catalogue(offers, default), settings=settings, keys=keys), bool(keys))
    return 0


def _run_replicas(arguments: argparse.Namespace, file: ServerFile | None, settings: Settings) -> int:
    """Several server processes behind this one."""
    from mnemos.cluster.front import Front
    from mnemos.cluster.local import Replicas
    from mnemos.serve.logs import set_up

    _offers(arguments, file)  # what is wrong with them is said here, once
    keys = _keys(arguments, file, settings)
    set_up(settings.log_format == "json")
    with Replicas(arguments.replicas, run_replica, arguments, settings) as replicas:
        _listen_and_serve(Front(replicas.answer, settings), bool(keys))
    return 0


def run_replica(path: str, stored: str, arguments: argparse.Namespace, settings: Settings) -> None:
    """One of several processes: serves at the UNIX socket `path`, and stores responses where all of them do."""
    from mnemos.serve.application import app
    from mnemos.serve.catalogue import Catalogue
    from mnemos.serve.logs import set_up
    from mnemos.serve.run import listen, serve

    responses = stored if settings.responses == ":memory:" else settings.responses
    settings = replace(settings, uds=path, tls_cert=None, tls_key=None, responses=responses)
    set_up(settings.log_format == "json")
    try:
        file = _file(arguments.config)
        offers, default = _offers(arguments, file)
        application = app(Catalogue(offers, default), settings=settings, keys=_keys(arguments, file, settings))
        serve(application, listen(settings))
    except MnemosError as error:
        print(f"mnemos: error: {error}", file=sys.stderr)
        sys.exit(1)


def _listen_and_serve(application: Application, has_keys: bool) -> None:
    """Serves at the settings' address until a signal."""
    from mnemos.serve.run import address, listen, serve, warning

    settings = application.settings
    listener = listen(settings)
    loud = warning(settings, has_keys)
    if loud:
        print(f"mnemos: warning: {loud}", file=sys.stderr)

    def say_ready() -> None:
        print(f"mnemos: ready at {address(listener, settings)}  (Ctrl-C stops)", file=sys.stderr, flush=True)

    serve(application, listener, say_ready)


def _keys(arguments: argparse.Namespace, file: ServerFile | None, settings: Settings) -> Keys:
    from mnemos.serve.keys import Keys

    key = os.environ.get("MNEMOS_API_KEY")
    path = arguments.api_key_file or (file.api_key_file if file else None)
    return Keys([key] if key else [], settings.share_cache, path)


def _offers(arguments: argparse.Namespace, file: ServerFile | None) -> tuple[list[Offer], str | None]:
    """The models on offer and the name of the default one."""
    offers = [*(file.offers if file else []), *(_offer(text, arguments) for text in arguments.models)]
    if not offers:
        raise ConfigError("there is no model to serve; name one, such as smollm2-135m, or give --config FILE")
    offers = _with_aliases([_checked(offer, arguments.keep_alive) for offer in offers], arguments.alias)
    return offers, arguments.default or (file.default if file else None)


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
    for option in ("session_dir", "response_cache"):
        if (value := getattr(arguments, option)) is not None:
            options[option] = value
    if arguments.lora_modules:
        if len(arguments.models) > 1:
            raise ConfigError(
                f"lora_modules are given for {len(arguments.models)} models; name each model's in a --config file"
            )
        options["adapters"] = dict(map(_named_folder, arguments.lora_modules))
    return offer(source if equals else text, name if equals else None, options, _load)


def _named_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"lora_modules is {text!r}; expected NAME=FOLDER")
    return name, folder


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
