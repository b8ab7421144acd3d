"""`mnemos chat`: a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.cli.generation import add_generation_arguments, generation_config
from mnemos.cli.options import add_model_arguments, add_session_dir, load_engine, tokenizer_of
from mnemos.cli.streaming import StreamView
from mnemos.cli.terminal import is_terminal, remark
from mnemos.errors import ConfigError, MnemosError, RequestError, shown

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.engine.session import Session
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
    parser.add_argument("--session", metavar="NAME", help="keep the conversation, or continue the one of this name")
    add_session_dir(parser)
    add_generation_arguments(parser, results=False)
    commands = "\n".join(f"  {name:<12} {meaning}" for name, meaning in COMMANDS)
    parser.epilog = (
        f"in the conversation:\n{commands}\n  Ctrl-C       stop the answer\n\n"
        "examples:\n"
        "  mnemos chat\n"
        "  mnemos chat qwen3.gguf --system 'You answer in one sentence.' --temperature 0.7 --top-p 0.9\n"
        "  mnemos chat --session rainbow"
    )


def run(arguments: argparse.Namespace) -> int:
    config = generation_config(arguments)
    with load_engine(arguments, session_dir=arguments.session_dir) as engine:
        tokenizer = tokenizer_of(engine, arguments.model)
        if not tokenizer.chat_template:
            raise ConfigError(f"{arguments.model} has no chat template; use mnemos generate --raw")
        kept = None if arguments.session is None else engine.session(arguments.session)
        Conversation(engine, tokenizer, config, arguments.system, kept).talk()
    return 0


class Conversation:
    """The messages so far, and the loop that adds to them. session: keeps them, if there is one."""

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        system: str | None,
        session: Session | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.session = session
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self.opening)
        if session is not None and session.messages:
            self.messages = session.messages
            self._continue(session)

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
            if self.session is not None and self.session.turns:
                self.session.rewind(self.session.turns)
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
        new = [{"role": "user", "content": text}]
        if self.session is not None and not self.session.messages:
            new = [*self.opening, *new]
        self._make_room(new)
        view, ending = StreamView(), ""
        if self.session is not None:
            events: Any = self.session.stream_chat(new, self.config)
        else:
            events = self.engine.stream_chat([*self.messages, *new], self.config)
        try:
            with closing(events):
                view.show_answer(events)
        except KeyboardInterrupt:
            ending = ", stopped"
        if self.session is not None:
            self.messages = self.session.messages or list(self.opening)
        elif view.tokens:
            self.messages += [*new, {"role": "assistant", "content": view.text.strip()}]
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

    def _continue(self, session: Session) -> None:
        """Says where the session stands."""
        opening = [message for message in self.messages[:1] if message["role"] == "system"]
        if self.opening and opening != self.opening:
            raise ConfigError(
                f"system is {shown(self.opening[0]['content'])}, and the session {session.name!r} began with "
                f"{shown(opening[0]['content']) if opening else 'none'}; leave it out, or use another session"
            )
        self.opening = opening
        count = sum(message["role"] == "user" for message in self.messages)
        remark(f"The session {session.name} goes on after {count} message{'' if count == 1 else 's'} of yours.")

    def _make_room(self, new: list[dict[str, Any]]) -> None:
        """Forgets the oldest exchanges if the context is too short for all, a quarter of it at once."""
        context = self.engine.spec.context_length
        room = context - min(ANSWER_ROOM, context // 4)
        start, dropped = len(self.opening), 0
        kept = self.messages[start:]
        length = len(self.tokenizer.encode_chat([*self.messages, *new]))
        most = room
        while length > most:
            if not kept:
                raise RequestError(f"the message takes {length} tokens, the context has room for {room}")
            following = (index for index, message in enumerate(kept) if index and message["role"] == "user")
            kept = kept[next(following, len(kept)) :]
            dropped += 1
            length = len(self.tokenizer.encode_chat([*self.opening, *kept, *new]))
            most = room * 3 // 4 if kept else room
        if dropped:
            if self.session is not None:
                self.session.drop(len(self.messages) - start - len(kept))
            self.messages = [*self.opening, *kept]
            remark(f"(the context is full: the oldest {dropped} exchange{'s' if dropped > 1 else ''} forgotten)")
