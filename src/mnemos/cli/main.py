"""The command `mnemos`: finds the subcommand, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from mnemos import __version__
from mnemos.errors import ConfigError

# Each is a module of this package with `add_arguments(parser)` and `run(arguments) -> exit code`.
COMMANDS = {
    "generate": "continue a text or answer a question",
    "chat": "talk with a model",
    "serve": "answer over HTTP, with the APIs that clients know and a page to talk in",
    "pull": "fetch a model into the cache",
    "models": "list cached models, or remove one",
    "sessions": "list the conversations that are kept, or forget some",
    "inspect": "show what a model file contains and what it needs",
    "embed": "turn texts into vectors",
    "prune": "remove neurons, heads or layers from a model",
    "distill": "train a smaller student of a model",
    "merge": "merge LoRA adapters into a model",
    "export": "write a model for another runtime: ONNX, OpenVINO, llama.cpp, transformers",
    "package": "pack a model as one folder or file that proves itself",
    "eval": "measure perplexity on a text file, and what a smaller model has lost",
    "quantize": "write a model in a smaller storage type",
    "bench": "measure speed, startup time and memory",
}
MODULES = {"eval": "evaluate"}

FAILURE, USAGE, INTERRUPTED, TERMINATED, BROKEN_PIPE = 1, 2, 130, 143, 141


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, and accepts a command's options anywhere among its arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self._in_parts = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # In a single pass, `generate MODEL --raw PROMPT` would miss PROMPT: MODEL alone already satisfies argparse.
        if self._subparsers is not None or self._in_parts:
            return super().parse_known_args(args, namespace)
        self._in_parts = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._in_parts = False
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def _refuse(self, unknown: Sequence[str]) -> None:
        """Exits with the unknown words, and the option most similar to the first of them."""
        from mnemos.rules import nearest

        words = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = nearest(words[0], self._option_string_actions) if words else None
        self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near}?" if near else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            from mnemos.rules import hint

            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}; {hint(value, action.choices, 'the choices')}"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"mnemos: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 after an error, 2 for wrong usage, 128 + n after signal n.

    Without `argv`, it runs the command line of this process and then exits.
    """
    code = _run(sys.argv[1:] if argv is None else list(argv))
    if argv is None:
        _leave(code)
    return code


def _run(words: list[str]) -> int:
    gc.set_threshold(100_000, 10, 10)  # most objects are created early and stay; scanning them takes a tenth of it
    if "numpy" not in words:  # the NumPy backend; others have their own threads, and NumPy's would slow down the start
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = None
    try:
        arguments = _parser(words).parse_args(words)  # a command whose packages are missing says so here
        _prepare_streams()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("mnemos: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "--debug" in words if arguments is None else arguments.debug:
            raise
        from mnemos.cli.terminal import one_line  # here, as most commands end without an error

        print(f"mnemos: error: {one_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else FAILURE


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"mnemos: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _parser(words: Sequence[str]) -> Parser:
    """The parser; only the command in `words` gets its arguments, so that no other is imported."""
    parser = Parser(
        prog="mnemos",
        description="Runs language models on the machine you have.",
        epilog="Start with:  mnemos chat smollm2-135m\nCommand help:  mnemos COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"mnemos {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            module = import_module(f"mnemos.cli.{MODULES.get(name, name)}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run)
    return parser


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks becomes a mark instead of an error
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_terminate)


def _on_terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(TERMINATED)  # an exception, so that half-written files are removed on the way out


def _leave(code: int) -> None:
    """Exits like the interpreter, but without destroying every object first, which takes 20 ms.

    Returns if the interpreter is still needed: by threads, a debugger or profiler, or after failed output.
    """
    others = set(threading.enumerate()) - {threading.current_thread()}
    if sys.gettrace() or sys.getprofile() or sys.flags.inspect or not all(thread.daemon for thread in others):
        return
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed at the start
            stream.flush()
    except (OSError, ValueError):
        return
    os._exit(code)


def _discard_output() -> None:
    """Called when the output's reader is gone; keeps the interpreter from complaining about it at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
