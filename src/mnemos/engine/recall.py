"""What an engine finds again by its words: texts that were given to it, and the sessions that it keeps.

Similarity ranks, it never answers: what is found is offered to the caller, or brought into the cache before it is asked
for, so that a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mnemos.errors import ConfigError, FormatError, MnemosError, RequestError, shown
from mnemos.memory.lexical import LexicalIndex
from mnemos.memory.session_file import said_in
from mnemos.memory.session_folder import session_files
from mnemos.memory.text_store import TextStore
from mnemos.rules import COUNT
from mnemos.rules import text as text_rule

if TYPE_CHECKING:
    from mnemos.engine.sessions import Sessions
    from mnemos.text.tokenizer import Tokenizer

Encoder = Callable[[str], Any]
Kind = Literal["text", "session"]
KINDS: tuple[Kind, ...] = ("text", "session")
NAME = text_rule(200)


@dataclass(frozen=True)
class Recalled:
    """Something that suits a question: the text, or what was said in the session, of this name.

    score: of BM25, from 0 and without a limit, or the cosine of an encoder's vectors.
    """

    kind: Kind
    name: str
    text: str
    score: float


class SemanticMemory:
    """Stored texts and sessions, ranked by what they have in common with a question. Safe to use from many threads.

    folder: of the sessions, where the texts are kept too. encoder: see `recall`.
    """

    def __init__(
        self, sessions: Sessions, folder: Path, tokenizer: Tokenizer | None, encoder: Encoder | None = None
    ) -> None:
        self.encoder = encoder
        self._sessions = sessions
        self._folder = folder
        self._tokenizer = tokenizer
        self._store = TextStore(folder)
        self._lock = threading.Lock()
        self._words = LexicalIndex()
        self._known: dict[str, str] = {}  # the texts in the index, by kind and name
        self._read: dict[str, tuple[tuple[int, int], str]] = {}  # sessions as of their files' times and sizes
        self._vectors: dict[tuple[Encoder, str], npt.NDArray[np.float64]] = {}

    def add(self, text: str, name: str | None = None) -> str:
        """Keeps a text, also for later processes; returns its name: `name`, or one made from the text.

        A text of the same name is replaced. FormatError if it cannot be stored.
        """
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"text is {shown(text)}; it must be a text with words")
        chosen: str = sha256(text.encode()).hexdigest()[:16] if name is None else NAME.apply("name", name)
        with self._lock:
            self._store.add(chosen, text)
        return chosen

    def texts(self) -> dict[str, str]:
        """The texts by name, in the order of their addition."""
        with self._lock:
            return dict(self._store.texts())

    def forget(self, name: str) -> None:
        """Deletes a text, from the disk too. RequestError if there is none of this name."""
        with self._lock:
            if not self._store.forget(name):
                raise RequestError(f"name is {shown(name)}; there is no text of this name")

    def recall(
        self,
        text: str,
        k: int = 3,
        *,
        kinds: Iterable[Kind] = KINDS,
        encoder: Encoder | None = None,
        preload: bool = False,
    ) -> list[Recalled]:
        """The at most `k` texts and sessions that suit `text` best, the best first.

        By their words (BM25), or by an encoder: any function from a text to a vector, of which the cosine ranks; by
        default the one in `encoder`. kinds: "text", "session" or both. preload: the sessions among them are brought
        into the cache, the best first, so that they continue at once.
        """
        COUNT.apply("k", k)
        if not isinstance(text, str):
            raise RequestError(f"text is {shown(text)}; it must be a text")
        wanted = set(kinds)
        if not wanted <= set(KINDS):
            raise ConfigError(f"kinds is {shown(kinds)}; it must have text, session or both")
        chosen = self.encoder if encoder is None else encoder
        with self._lock:
            self._update()
            candidates = [key for key in self._known if key.partition(":")[0] in wanted]
            if chosen is not None:
                ranked = self._by_encoder(chosen, text, candidates)[:k]
            else:
                ranked = [(key, score) for key, score in self._words.rank(text, len(self._known)) if key in candidates][
                    :k
                ]
            found = [_recalled(key, self._known[key], score) for key, score in ranked]
        if preload:
            for one in found:
                if one.kind == "session":
                    self._preload(one.name)
        return found

    # Internals.

    def _update(self) -> None:
        """Takes in what was added, said or forgotten since the last time, by other processes too."""
        now = {f"text:{name}": text for name, text in self._store.texts().items()}
        paths = session_files(self._folder)
        self._read = {name: self._read[name] for name in self._read if name in paths}
        for name, path in paths.items():
            text = self._said(name, path)
            if text:
                now[f"session:{name}"] = text
        for key in [key for key in self._known if key not in now]:
            self._words.remove(key)
        for key, text in now.items():
            if self._known.get(key) != text:
                self._words.add(key, text)
        self._known = now
        texts = set(now.values())
        self._vectors = {known: vector for known, vector in self._vectors.items() if known[1] in texts}

    def _said(self, name: str, path: Path) -> str:
        """What was said in a session; empty if its file cannot be read."""
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if name not in self._read or self._read[name][0] != version:
                messages, tokens = said_in(path)
                if messages:
                    text = "\n".join(str(message.get("content") or "") for message in messages)
                else:
                    text = "" if self._tokenizer is None else self._tokenizer.decode(tokens)
                self._read[name] = (version, text)
        except (OSError, FormatError, RequestError):  # `sessions` says what is wrong with it
            return ""
        return self._read[name][1]

    def _by_encoder(self, encoder: Encoder, text: str, keys: list[str]) -> list[tuple[str, float]]:
        question = _vector(encoder, text)
        scores = []
        for key in keys:
            known = (encoder, self._known[key])
            if known not in self._vectors:
                self._vectors[known] = _vector(encoder, known[1])
            if self._vectors[known].shape != question.shape:
                raise ConfigError(
                    f"encoder gives vectors of {len(question)} and of {len(self._vectors[known])} values; they must be "
                    "of one size"
                )
            scores.append((key, float(question @ self._vectors[known])))
        return sorted(scores, key=lambda pair: -pair[1])

    def _preload(self, name: str) -> None:
        try:
            self._sessions.open(name).preload()
        except MnemosError:  # in use elsewhere, or of another model: it is read when it is continued
            return


def _recalled(key: str, text: str, score: float) -> Recalled:
    kind, _, name = key.partition(":")
    return Recalled("session" if kind == "session" else "text", name, text, score)


def _vector(encoder: Encoder, text: str) -> npt.NDArray[np.float64]:
    """A text's vector, of length 1. ConfigError if it is none."""
    try:
        vector = np.asarray(encoder(text), dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"encoder gives no vector of numbers for a text: {error}") from error
    if not vector.size or not np.isfinite(vector).all():
        raise ConfigError(
            f"encoder gives a vector of {vector.size} values, not all finite; it must be of finite numbers"
        )
    return vector / max(float(np.linalg.norm(vector)), 1e-30)
