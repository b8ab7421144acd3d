"""An engine with scripted answers, for testing the code around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from mnemos.engine.answers import AnswerEvent, End, Piece
from mnemos.engine.completion import StreamedToken


class ScriptedTokenizer:
    """A word is a token; chats are written as `role: content` lines."""

    def __init__(self, template: str | None = "a template") -> None:
        self.chat_template = template
        self.texts: list[str] = []

    def encode(self, text: str, **options: Any) -> list[int]:
        self.texts.append(text)
        return list(range(len(text.split())))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("\n".join(f"{message['role']}: {message['content']}" for message in messages))


class ScriptedEngine:
    """Answers every prompt with the next of `answers`: words, or an exception that is raised in its place."""

    def __init__(self, *answers: list[str | BaseException], context: int = 1000, template: str | None = "a") -> None:
        self.answers = list(answers)
        self.tokenizer = ScriptedTokenizer(template)
        self.spec = SimpleNamespace(context_length=context)
        self.configs: list[Any] = []

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def stream(self, prompt: list[int], config: Any) -> Iterator[StreamedToken]:
        self.configs.append(config)
        for number, piece in enumerate(self.answers.pop(0)):
            if isinstance(piece, BaseException):
                raise piece
            yield StreamedToken(piece, number)
        yield StreamedToken("", None, finish_reason="stop")

    def stream_chat(self, messages: list[dict[str, str]], config: Any) -> Iterator[AnswerEvent]:
        for token in self.stream([], config):
            yield Piece(0, token.text, (token,))
            if token.finish_reason is not None:
                yield End(0, token.finish_reason)

    def complete(self, prompt: list[int], config: Any) -> Any:
        self.configs.append(config)
        text = "".join(str(piece) for piece in self.answers.pop(0))
        return SimpleNamespace(to_json=lambda: f'{{"text": "{text}"}}')


def loads(engine: ScriptedEngine) -> Callable[..., ScriptedEngine]:
    """Replaces `load_engine`."""
    return lambda arguments, **running: engine
