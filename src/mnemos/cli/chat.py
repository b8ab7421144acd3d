"""`mnemos chat`: a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.generation import add_generation_arguments, generation_config
from mnemos.cli.options import add_model_arguments, load_engine, tokenizer_of
from mnemos.cli.streaming import StreamView
from mnemos.cli.terminal import is_terminal, remark
from mnemos.errors import ConfigError, MnemosError, RequestError

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.text.tokenizer import Tokenizer

COMMANDS = (
    ("/help", "show this list"),
    ("/reset", "clear the conversation, keep the system message"),
    ("/save FILE", "save the conversation: as JSON messages if FILE ends in .json, else as plain text"),
    ("/exit", "leave (so does Ctrl-D)"),
)
ANSWER_ROOM = 64  # the minimum number of context tokens that the history leaves for an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos chat [MODEL] [options]"
    add_model_arguments(parser, default="smollm2-135m")
    parser.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    add_generation_arguments(parser, results=False)
    commands = "\n".join(f"  {name:<12} {meaning}" for name, meaning in COMMANDS)
    parser.epilog = (
        f"in the conversation:\n{commands}\n  Ctrl-C       stop the answer\n\n"
        "examples:\n"
        "  mnemos chat\n"
        "  mnemos chat qwen3.gguf --system 'You answer in one sentence.' --temperature 0.7 --top-p 0.9"
    )


def run(arguments: argparse.Namespace) -> int:
    config = generation_config(arguments)
    with load_engine(arguments) as engine:
        tokenizer = tokenizer_of(engine, arguments.model)
        if not tokenizer.chat_template:
            raise ConfigError(f"{arguments.model} has no chat template; use mnemos generate --raw")
        Conversation(engine, tokenizer, config, arguments.system).talk()
    return 0


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(
        self, engine: InferenceEngine, tokenizer: Tokenizer, config: GenerationConfig, system: str | None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def talk(self) -> None:
        """Reads messages and answers until the input ends."""
        asks = is_terminal(sys.stdin) and is_terminal(sys.stdout)
        if asks:
            with suppress(ImportError):  # line editing and history, where the platform has them
                import readline

                readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
            remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                line = input("> " if asks else "").strip()
            except EOFError:
                if asks:
                    print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "/exit":
                return
            try:
                self.take(line)
            except MnemosError as error:
                print(f"mnemos: error: {error}", file=sys.stderr)
            except OSError as error:
                print(f"mnemos: error: {error.filename}: {error.strerror}", file=sys.stderr)

    def take(self, line: str) -> None:
        """Handles one line of input: a command or a message."""
        name, _, rest = line.partition(" ")
        if name == "/help":
            print("\n".join(f"{command:<12} {meaning}" for command, meaning in COMMANDS))
        elif name == "/reset":
            self.messages = list(self.opening)
            remark("The conversation starts over.")
        elif name == "/save":
            self.save(rest.strip())
        elif name.startswith("/"):
            raise ConfigError(f"{name} is not a command; /help lists them")
        elif line:
            self.answer(line)

    def answer(self, text: str) -> None:
        """Streams the answer to a message; if Ctrl-C stops it, the part shown so far is kept."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        view = StreamView()
        try:
            view.show(self.engine.stream(self._prompt(), self.config))
            ending = ""
        except KeyboardInterrupt:
            ending = ", stopped"
        except BaseException:
            self.messages = before
            raise
        if not view.tokens:
            self.messages = before
        else:
            self.messages.append({"role": "assistant", "content": view.text.strip()})
        print()
        remark(f"[{view.summary}{ending}]")

    def save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file")
        path = Path(name).expanduser()
        if path.suffix == ".json":
            content = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        else:
            content = "".join(f"{message['role']}: {message['content']}\n\n" for message in self.messages)
        path.write_text(content, encoding="utf-8")
        remark(f"{len(self.messages)} messages saved to {path}")

    def _prompt(self) -> list[int]:
        """The conversation's token ids; the oldest exchanges are dropped if the context is too short for all."""
        room = self.engine.spec.context_length - min(ANSWER_ROOM, self.engine.spec.context_length // 4)
        dropped = 0
        while len(ids := self.tokenizer.encode_chat(self.messages)) > room:
            rest = self.messages[len(self.opening) :]
            if len(rest) < 3:
                raise RequestError(f"the message takes {len(ids)} tokens, the context has room for {room}")
            self.messages = [*self.opening, *rest[2:]]
            dropped += 1
        if dropped:
            remark(f"(the context is full: the oldest {dropped} exchange{'s' if dropped > 1 else ''} forgotten)")
        return ids
