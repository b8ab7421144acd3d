"""A session: a text or a conversation that continues across requests and restarts, without being read again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnemos.contract import ModelSpec
from mnemos.decoding.config import GenerationConfig, choose_config
from mnemos.decoding.forced import ForcedReading
from mnemos.engine.chat import ChatCompletion, ChatHandle, check_tokenizer, read_chat
from mnemos.engine.completion import Completion, StreamedToken
from mnemos.engine.prompts import read_prompts
from mnemos.engine.session_pages import SessionPages, has_usual_pages, shared_length
from mnemos.engine.turn import Turn
from mnemos.errors import CapacityError, RequestError, shown
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_folder import session_path
from mnemos.memory.session_records import Turn as TurnRecord
from mnemos.rules import COUNT, whole
from mnemos.text.conversation import check_messages

if TYPE_CHECKING:
    from mnemos.contract import Cache
    from mnemos.decoding.config import AnyConfig
    from mnemos.engine.answers import AnswerEvent
    from mnemos.engine.launching import Launcher
    from mnemos.engine.thread import EngineThread
    from mnemos.memory.prefix import PrefixTree
    from mnemos.text.tokenizer import Tokenizer
    from mnemos.text.tools.exchange import Exchange

    Config = AnyConfig | None

Message = dict[str, Any]
_LENGTH = whole(0)


@dataclass(frozen=True)
class Host:
    """What sessions need of their engine. tree, cache: None if its prefixes are not cached."""

    tokenizer: Tokenizer | None
    spec: ModelSpec
    launcher: Launcher
    thread: EngineThread
    defaults: GenerationConfig | None
    tree: PrefixTree | None
    cache: Cache | None


class Session:
    """A text, or a conversation if `chat` began it, that every turn continues. Made by `InferenceEngine.session`.

    A turn is on the disk when it ends, with the cache pages that it was read into. Only one turn can be in progress at
    a time: CapacityError for a second one. Methods may be called from any thread; a context manager.
    """

    def __init__(self, host: Host, file: SessionFile, open: Callable[[str], Session]) -> None:
        self._host = host
        self._open = open  # another session of the same folder
        self._file = file
        self._busy = threading.Lock()
        self._pages = SessionPages(host.thread, host.tree, host.cache, file)

    @property
    def name(self) -> str:
        """Its name."""
        return self._file.name

    @property
    def closed(self) -> bool:
        """True after `close` or `forget`."""
        return self._file.closed

    @property
    def tokens(self) -> list[int]:
        """All that was said so far, as token ids; for a conversation, as its template wrote it."""
        return list(self._file.tokens)

    @property
    def text(self) -> str:
        """All that was said so far. RequestError for an engine without a tokenizer."""
        if self._host.tokenizer is None:
            raise RequestError(f"the session {self.name!r} has token ids, and the engine no tokenizer; see tokens")
        return self._host.tokenizer.decode(self._file.tokens)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far; empty for a text."""
        return list(self._file.messages)

    @property
    def turns(self) -> int:
        """The number of turns."""
        return len(self._file.turns)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._file.size

    # Texts.

    def generate(self, prompt: Any = None, config: Config = None, **overrides: Any) -> Any:
        """Adds a prompt to the text, if one is given, and what follows; returns what follows.

        That is a text, or token ids where the prompt was or the engine has no tokenizer. config, overrides: as in
        `InferenceEngine.generate`, for one result.
        """
        completion = self.submit(prompt, config, **overrides).result()
        as_text = self._host.tokenizer is not None and (prompt is None or isinstance(prompt, str))
        return completion.text if as_text else completion.token_ids

    def stream(self, prompt: Any = None, config: Config = None, **overrides: Any) -> Iterator[StreamedToken]:
        """`generate`, token by token."""
        return iter(self.submit(prompt, config, **overrides))

    def submit(self, prompt: Any = None, config: Config = None, **overrides: Any) -> Turn[StreamedToken, Completion]:
        """`generate`, queued at once."""
        chosen = choose_config(config, self._host.defaults, **overrides)
        _check_single(chosen)
        ends = chosen.eos_ids or self._host.spec.eos_token_ids
        self._begin()
        try:
            prompt_ids = self._continued(prompt)
            self._load(prompt_ids, chosen)
            handle = self._host.launcher.prepare(prompt_ids, chosen, generates=True)()
        except BaseException:
            self._busy.release()
            raise

        def store(completion: Completion) -> None:
            tokens = completion.token_ids
            if completion.finish_reason == "stop" and tokens and tokens[-1] in ends:
                tokens = tokens[:-1]  # the text goes on
            self._save([*prompt_ids, *tokens], [], chosen)

        return Turn(handle, handle, store, self._busy.release)

    # Conversations.

    def chat(self, messages: Any, config: Config = None, **options: Any) -> ChatCompletion:
        """The answer to a text of the user, or to new messages, after those of the session.

        config, options: as in `InferenceEngine.chat`, for one result.
        """
        return self.submit_chat(messages, config, **options).result()

    def stream_chat(self, messages: Any, config: Config = None, **options: Any) -> Iterator[AnswerEvent]:
        """The events of the answer as they arrive."""
        return iter(self.submit_chat(messages, config, **options))

    def submit_chat(self, messages: Any, config: Config = None, **options: Any) -> Turn[AnswerEvent, ChatCompletion]:
        """`chat`, queued at once."""
        new = self._messages_of(messages)
        tokenizer, host = check_tokenizer(self._host.tokenizer), self._host
        asked = options.get("continue_final_message")
        continues = new[-1]["role"] == "assistant" if asked is None else bool(asked)

        def read(conversation: Sequence[Message]) -> tuple[Exchange, GenerationConfig]:
            chosen = choose_config(config, host.defaults)
            _, exchange, chosen = read_chat(conversation, tokenizer, host.spec, chosen, options)
            return exchange, chosen

        return self.answer(new, read, continues)

    def answer(
        self,
        new: Sequence[Message],
        read: Callable[[Sequence[Message]], tuple[Exchange, GenerationConfig]],
        continues: bool = False,
    ) -> Turn[AnswerEvent, ChatCompletion]:
        """Answers new messages; `read` makes a prompt of all, and says how it is continued.

        A system message that the session began with may be among them again. RequestError for another one.
        continues: the last of the new messages is the assistant's, and the answer continues it.
        """
        self._begin()
        try:
            new = self._without_opening(new)
            exchange, config = read([*self._file.messages, *new])
            _check_single(config)
            self._load(exchange.prompt_ids, config)
            handle = ChatHandle(self._host.launcher.prepare(exchange.prompt_ids, config, generates=True)(), exchange)
        except BaseException:
            self._busy.release()
            raise

        def store(answered: ChatCompletion) -> None:
            tokens = answered.completion.token_ids
            if tokens:  # else it was stopped before it had said anything
                messages = _joined(new, answered.message, continues)
                self._save([*exchange.prompt_ids, *tokens], messages, config)

        return Turn(handle, handle.request, store, self._busy.release)

    # Both.

    def append(self, content: Any, **scheduling: Any) -> int:
        """Adds a text, token ids or messages and reads them, without an answer; returns the number of all tokens.

        scheduling: priority, tenant, deadline and cache_salt, as in GenerationConfig.
        """
        config = GenerationConfig(**scheduling)
        with self._changing():
            new: list[Message] = []
            if self._file.messages or _are_messages(content):
                new = self._messages_of(content)
                tokenizer = check_tokenizer(self._host.tokenizer)
                token_ids = tokenizer.encode_chat([*self._file.messages, *new], False)
            else:
                token_ids = self._continued(content)
            self._load(token_ids, config)
            self._host.launcher.prepare_forced(ForcedReading(), token_ids, config)().result()
            self._save(token_ids, new, config)
        return len(token_ids)

    def preload(self, *, cache_salt: str | None = None) -> None:
        """Brings what was said into the cache ahead of the next turn, as far as it is stored and there is room."""
        with self._changing():
            if self._file.tokens:
                self._pages.load([*self._file.tokens, 0], cache_salt)

    def drop(self, messages: int) -> None:
        """Forgets the oldest messages after a system message, for a context that is too short for all.

        What was said after them is read again with the next turn. RequestError if there are not as many.
        """
        file = self._file
        with self._changing():
            messages = COUNT.apply("messages", messages)
            start = int(bool(file.messages) and file.messages[0]["role"] == "system")
            if messages > len(file.messages) - start:
                raise RequestError(
                    f"messages is {messages}; the session {self.name!r} has {len(file.messages) - start}, "
                    "without a system message"
                )
            left = [*file.messages[:start], *file.messages[start + messages :]]
            tokens = check_tokenizer(self._host.tokenizer).encode_chat(left, False) if left else []
            self._save(tokens, [], GenerationConfig(), removed=(start, start + messages))

    def rewind(self, turns: int = 1, *, tokens: int | None = None) -> None:
        """Takes back the last turns, or, of a text, everything after its first `tokens` tokens.

        What is taken back leaves the disk and the cache. RequestError if there is not that much.
        """
        file = self._file
        with self._changing():
            if tokens is None:
                turns = COUNT.apply("turns", turns)
                if turns > len(file.turns):
                    raise RequestError(f"turns is {turns}; the session {self.name!r} has {len(file.turns)}")
                kept, rest = len(file.turns) - turns, []
            else:
                tokens = _LENGTH.apply("tokens", tokens)
                if file.messages or tokens > len(file.tokens):
                    raise RequestError(
                        f"tokens is {tokens}; the session {self.name!r} is "
                        + ("a conversation, which is rewound by turns" if file.messages else f"{len(file.tokens)} long")
                    )
                kept = file.turns_within(tokens)
                rest = file.tokens[sum(len(turn.tokens) for turn in file.turns[:kept]) : tokens]
            before = file.tokens
            file.rewind(kept)
            if rest:
                self._save([*file.tokens, *rest], [], GenerationConfig())
            self._pages.forget(before, shared_length(before, file.tokens))

    def fork(self, name: str, turns: int | None = None) -> Session:
        """Another session that begins with this one's turns, or the first `turns` of them. FormatError if it exists."""
        file = self._file
        with self._changing():
            count = max(len(file.turns), 1) if turns is None else COUNT.apply("turns", turns)
            if count > len(file.turns):
                raise RequestError(f"turns is {count}; the session {self.name!r} has {len(file.turns)} to fork")
            file.copy(session_path(file.path.parent, name), name, count)
        return self._open(name)

    def forget(self) -> None:
        """Deletes the session, from the disk and from the cache. It cannot be used any longer."""
        with self._changing():
            self._pages.forget(self._file.tokens, 0)
            self._file.remove()

    def close(self) -> None:
        """Lets others open the session; it stays on the disk. A turn in progress cannot be stored any longer."""
        self._file.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Internals.

    def _begin(self) -> None:
        """Keeps others from changing the session."""
        if not self._busy.acquire(blocking=False):
            raise CapacityError(
                f"the session {self.name!r} has a turn in progress; read that to its end, or fork the session"
            )
        if self._file.closed:
            self._busy.release()
            raise RequestError(f"the session {self.name!r} is closed; open it again with engine.session")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """For a change that ends with the call; that of a turn ends with its answer."""
        self._begin()
        try:
            yield
        finally:
            self._busy.release()

    def _continued(self, prompt: Any) -> list[int]:
        """The text with a prompt after it."""
        before = self._file.tokens
        if self._file.messages:
            raise RequestError(f"the session {self.name!r} is a conversation; use chat, or append with messages")
        if prompt is None:
            return list(before)
        if isinstance(prompt, str) and before and self._host.tokenizer is not None:
            return [*before, *self._host.tokenizer.encode(prompt, continues=True)]
        return [*before, *read_prompts(prompt, None, self._host.tokenizer).only]

    def _messages_of(self, given: Any) -> list[Message]:
        """New messages of a conversation; a text is the user's."""
        if self._file.tokens and not self._file.messages:
            raise RequestError(f"the session {self.name!r} is a text, not a conversation; use generate")
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        checked = [dict(message) for message in check_messages([given] if isinstance(given, Mapping) else given)]
        if not checked:
            raise RequestError("messages is empty; a turn needs at least one message")
        return checked

    def _without_opening(self, new: Sequence[Message]) -> Sequence[Message]:
        """New messages without the system message that the session has already."""
        before = self._file.messages
        if not before or not new or new[0].get("role") != "system":
            return new
        if new[0].get("content") != before[0].get("content"):
            raise RequestError(
                f"messages[0] is a system message, {shown(new[0].get('content'))}, and the session {self.name!r} began "
                "with another message; leave it out, or begin another session"
            )
        if len(new) == 1:
            raise RequestError("messages has the session's system message only; a turn needs another one")
        return new[1:]

    def _load(self, prompt_ids: Sequence[int], config: GenerationConfig) -> None:
        """Brings stored pages into the cache; with an adapter or a memory of its own, a turn has others."""
        if has_usual_pages(config):
            self._pages.load(prompt_ids, config.cache_salt)

    def _save(
        self,
        tokens: Sequence[int],
        messages: list[Message],
        config: GenerationConfig,
        removed: tuple[int, int] = (0, 0),
    ) -> None:
        """Ends a turn, after which the session has these tokens and these further messages."""
        file = self._file
        if file.closed:
            raise RequestError(f"the session {self.name!r} was closed before its turn had ended; the turn is lost")
        keep = shared_length(file.tokens, tokens)
        file.append(
            TurnRecord(keep, list(tokens[keep:]), [dict(one) for one in messages], removed),
            self._pages.new(tokens, keep, config.cache_salt) if has_usual_pages(config) else (),
        )


def _joined(new: Sequence[Message], answer: Message, continues: bool) -> list[Message]:
    """The messages of a turn. An answer that continues the last of them becomes a part of it."""
    if not continues or not new or new[-1].get("role") != "assistant":
        return [*new, answer]
    whole = f"{new[-1].get('content') or ''}{answer.get('content') or ''}"
    return [*new[:-1], {**answer, "content": whole}]


def _are_messages(content: Any) -> bool:
    first = content[0] if isinstance(content, (list, tuple)) and content else content
    return isinstance(first, Mapping)


def _check_single(config: GenerationConfig) -> None:
    if config.num_return_sequences != 1:
        count = config.num_return_sequences
        raise RequestError(f"num_return_sequences is {count}; a session continues with one result: leave it out")
