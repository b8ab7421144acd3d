"""`mnemos generate`: one prompt, one text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mnemos.cli.generation import add_generation_arguments, generation_config
from mnemos.cli.options import add_model_arguments, load_engine, tokenizer_of
from mnemos.cli.streaming import StreamView
from mnemos.cli.terminal import is_terminal, remark
from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos generate MODEL [PROMPT] [options]"
    add_model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; read from standard input if not given")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as it is, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--json", action="store_true", help="print the whole completion as a JSON object at the end")
    parser.add_argument("--quiet", action="store_true", help="do not report the speed on standard error")
    add_generation_arguments(parser, results=True)
    parser.epilog = (
        "A model with a chat template gets PROMPT as a user's message; without one, or with --raw, it is continued.\n\n"
        "examples:\n"
        "  mnemos generate smollm2-135m 'Why is the sky blue?'\n"
        "  mnemos generate smollm2-135m --raw 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 1\n"
        "  mnemos generate model.gguf --max-new-tokens 64 --json < prompt.txt"
    )


def run(arguments: argparse.Namespace) -> int:
    config = generation_config(arguments)
    if arguments.raw and arguments.system:
        raise ConfigError("--system needs the chat template, which --raw leaves out; give one of them")
    if config.num_return_sequences > 1 and not arguments.json:
        raise ConfigError(f"--num-return-sequences is {config.num_return_sequences}; several results need --json")
    text = _read_prompt(arguments.prompt)
    if not text:
        raise ConfigError(
            f"the prompt is empty; give it after the model, which is {arguments.model!r} here, or on standard input"
        )
    with load_engine(arguments) as engine:
        prompt = _prompt_ids(tokenizer_of(engine, arguments.model), text, arguments)
        if arguments.json:
            print(engine.complete(prompt, config).to_json())
            return 0
        view = StreamView()
        try:
            view.show(engine.stream(prompt, config))
        finally:
            if view.tokens:
                print()
        if not arguments.quiet:
            remark(f"[{view.summary}]")
    return 0


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if is_terminal(sys.stdin):
        remark("Type the prompt, then Ctrl-D on an empty line.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on standard input is not {error.encoding}: {error.reason}") from error


def _prompt_ids(tokenizer: Tokenizer, text: str, arguments: argparse.Namespace) -> list[int]:
    if arguments.raw or not tokenizer.chat_template:
        if arguments.system:
            raise ConfigError(f"--system needs a model with a chat template; {arguments.model} has none")
        return tokenizer.encode(text)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return tokenizer.encode_chat([*system, {"role": "user", "content": text}])
