"""When a text ends: stop tokens, stop strings, lengths, loops, time and a user's own criteria."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from mnemos.decoding.history import History
from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.decoding.tokenizer_like import DecoderLike
from mnemos.errors import MnemosError, RequestError


class StopStrings:
    """Passes text on up to the first stop string, and never a part of one.

    Text that may be the beginning of a stop string is held back until the following text decides. Of several stop
    strings, the first to be complete counts, however the text was split into pieces. Names of special tokens are not
    shown, but a stop string may be, or contain, such a name.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        """include: the stop string that matches is passed on too."""
        self._strings = tuple(strings)
        self._include = include
        self._longest = max(map(len, self._strings), default=1)
        self._held = ""
        self._shown: list[bool] = []  # of each character that is held
        self.matched: str | None = None

    def push(self, piece: str, shown: bool = True) -> str:
        """The text that is now certain. After a match, `matched` is set and nothing more is passed on."""
        self._take(piece, shown)
        text = self._held
        ends = [(start + len(stop), start, stop) for stop in self._strings if (start := text.find(stop)) >= 0]
        if not ends:
            return self._release(self._certain(text))
        _, start, self.matched = min(ends)
        certain = self._release(start)
        self._held, self._shown = "", []
        return certain + self.matched if self._include else certain

    def pass_through(self, piece: str, shown: bool = True) -> str:
        """Like `push`, but nothing in the text so far can be part of a match."""
        self._take(piece, shown)
        return self._release(len(self._held))

    def finish(self) -> str:
        """The text that was held back but turned out not to be a stop string."""
        return self.pass_through("")

    def _take(self, piece: str, shown: bool) -> None:
        self._held += piece
        self._shown += [shown] * len(piece)

    def _release(self, count: int) -> str:
        """The shown part of the first `count` characters, which are no longer held."""
        text = "".join(compress(self._held[:count], self._shown))
        self._held = self._held[count:]
        del self._shown[:count]
        return text

    def _certain(self, text: str) -> int:
        """Where the longest suffix of the text that is a prefix of a stop string begins."""
        for start in range(max(len(text) - self._longest + 1, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._strings):
                return start
        return len(text)


class RepetitionDetector:
    """Notices when the last tokens repeat one block over and over.

    A loop is a block of up to `longest_block` tokens, repeated `repeats` times and over at least `span` tokens.
    """

    def __init__(self, longest_block: int = 128, repeats: int = 4, span: int = 64) -> None:
        periods = np.arange(1, longest_block + 1)
        # A block of p tokens fills s tokens when the newest s - p of them equal those p positions earlier.
        self._enough = np.maximum(periods * repeats, span) - periods
        self._equal = np.zeros(longest_block, np.int64)
        self._recent = np.full(longest_block, -1, np.int64)  # newest first

    def push(self, token: int) -> bool:
        """True if the text has become a loop after this token."""
        self._equal = np.where(self._recent == token, self._equal + 1, 0)
        self._recent = np.roll(self._recent, 1)
        self._recent[0] = token
        return bool(np.any(self._equal >= self._enough))


@dataclass(frozen=True)
class End:
    """Why a text ended; `stopped_by` is the stop string or stop token, and `is_text` whether the last token is text."""

    reason: str
    stopped_by: str | int | None = None
    is_text: bool = True
    error: str | None = None


@dataclass(frozen=True)
class StopRules:
    """What ends the texts of one request. Lengths are in generated tokens; `deadline` is a time of `clock`.

    include: what ends a text, a stop string or a stop token, belongs to it.
    """

    stop_ids: frozenset[int]
    least: int
    most: int
    strings: tuple[str, ...] = ()
    criteria: tuple[Callable[[Sequence[int]], bool], ...] = ()
    detect_loops: bool = False
    deadline: float | None = None
    include: bool = False
    clock: Callable[[], float] = time.monotonic


class StopWatch:
    """Follows one text and decides when it ends and how much of it is certain."""

    def __init__(
        self,
        rules: StopRules,
        decoder: DecoderLike | None,
        name_of_special: Callable[[int], str] = lambda token: "",
    ) -> None:
        """`decoder` is needed if, and only if, the rules have stop strings.

        name_of_special: the name of a special token, which the decoder leaves out of the text; "" for other tokens.
        """
        self._rules = rules
        self._name_of_special = name_of_special
        self._decoder = decoder
        self._strings = StopStrings(rules.strings, rules.include)
        self._loops = RepetitionDetector() if rules.detect_loops else None
        self._text: list[str] = []
        self._generated = 0

    @property
    def text(self) -> str | None:
        """The whole text; None without stop strings."""
        return None if self._decoder is None else "".join(self._text)

    def push(self, token: int, tokens: Sequence[int]) -> tuple[str | None, End | None]:
        """Text that `token`, the last of `tokens`, made certain (None: the token's own), and the end if it has come."""
        self._generated += 1
        if token in self._rules.stop_ids:
            if not self._rules.include:
                return "", End("stop", token, is_text=False)
            return self._push_text(token), End("stop", token)
        piece = self._push_text(token)
        if self._strings.matched is not None:
            return piece, End("stop", self._strings.matched)
        return piece, self._other_end(token, tokens)

    def finished(
        self, end: End, history: History, sequence: int = 0, emitted: Sequence[Emitted] = ()
    ) -> FinishedSequence:
        """The ended text, with what was held back unless a stop string ended it; call it only once."""
        if self._decoder is not None and self._strings.matched is None:
            self._text.append(self._strings.push(self._decoder.finish()))
            self._text.append(self._strings.finish())
        tokens = history.tokens[history.prompt_length :]
        return FinishedSequence(
            tokens,
            end.reason,
            list(emitted),
            sequence=sequence,
            text_tokens=None if end.is_text else len(tokens) - 1,
            text=self.text,
            stopped_by=end.stopped_by,
            error=end.error,
        )

    def _push_text(self, token: int) -> str | None:
        if self._decoder is None:
            return None
        name = self._name_of_special(token)
        piece = name or self._decoder.push(token)
        early = self._generated <= self._rules.least
        certain = (self._strings.pass_through if early else self._strings.push)(piece, not name)
        self._text.append(certain)
        return certain

    def _other_end(self, token: int, tokens: Sequence[int]) -> End | None:
        rules = self._rules
        looping = self._loops is not None and self._loops.push(token)
        if rules.criteria and self._generated >= rules.least and any(_met(c, tokens) for c in rules.criteria):
            return End("stop")
        if looping:
            return End("repetition")
        if self._generated >= rules.most:
            return End("length")
        if rules.deadline is not None and rules.clock() >= rules.deadline:
            return End("time")
        return None


class TextEnds:
    """Tells whether the last token of a whole text ends it, for searches that keep many texts at once."""

    def __init__(self, rules: StopRules, decode: Callable[[Sequence[int]], Iterable[tuple[str, bool]]] | None) -> None:
        """`decode` is needed if the rules have stop strings: it gives pieces of text and whether each is shown."""
        self._rules = rules
        self._decode = decode

    def of(self, tokens: Sequence[int], prompt_length: int) -> tuple[End, str | None] | None:
        """The end, if it is one, and the text up to the stop string if one matched. `tokens` begin with the prompt."""
        rules, generated = self._rules, len(tokens) - prompt_length
        if tokens[-1] in rules.stop_ids:
            return End("stop", tokens[-1], is_text=rules.include), None
        if generated <= rules.least:
            return None
        if self._decode is not None:
            strings = StopStrings(rules.strings, rules.include)
            text = ""
            for piece, shown in self._decode(tokens[prompt_length:]):
                text += strings.push(piece, shown)
                if strings.matched is not None:
                    return End("stop", strings.matched), text
        if any(_met(criterion, tokens) for criterion in rules.criteria):
            return End("stop"), None
        return None

    @property
    def expired(self) -> bool:
        return self._rules.deadline is not None and self._rules.clock() >= self._rules.deadline


def _met(criterion: Any, tokens: Sequence[int]) -> bool:
    name = getattr(criterion, "__name__", type(criterion).__name__)
    try:
        return bool(criterion(tuple(tokens)))
    except MnemosError:
        raise
    except Exception as error:
        raise RequestError(f"stopping criterion {name} failed: {type(error).__name__}: {error}") from error
