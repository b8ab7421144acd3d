"""A limit to the reasoning before an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mnemos.text.tokenizer import Tokenizer
from mnemos.text.tools.families import Thinking


class ReasoningBudget:
    """A logits processor: after `budget` tokens of reasoning, the mark that ends it is all that may come.

    All reasoning of an answer counts: one that begins after the budget is spent ends at once. Text outside the marks
    is left alone. inside: the prompt has opened the reasoning already.
    """

    def __init__(self, budget: int, marks: Thinking, tokenizer: Tokenizer, *, inside: bool) -> None:
        self._budget = budget
        self._marks = marks
        self._tokenizer = tokenizer
        self._end = tokenizer.encode(marks.end, continues=True)
        self._opened = inside
        self._prompt: int | None = None  # its length: the first call comes before the first token
        self._read: list[int] = []
        self._inside = inside
        self._spent = 0
        self._held = ""  # may be the beginning of a mark

    def __call__(self, token_ids: Sequence[int], logits: Any) -> None:
        if self._prompt is None:
            self._prompt = len(token_ids)
        answer = list(token_ids[self._prompt :])
        if answer[: len(self._read)] != self._read:  # another sequence of the request
            self._forget()
        for token in answer[len(self._read) :]:
            self._take(token)
        self._read = answer
        if not self._inside or self._spent < self._budget:
            return
        sizes = range(len(self._end) - 1, -1, -1)
        written = next(size for size in sizes if answer[len(answer) - size :] == self._end[:size])
        forced = self._end[written]
        kept = logits[forced]
        logits[:] = -float("inf")
        logits[forced] = kept if kept > -float("inf") else 0.0

    def _forget(self) -> None:
        self._read, self._inside, self._spent, self._held = [], self._opened, 0, ""

    def _take(self, token: int) -> None:
        self._spent += self._inside
        self._held += self._tokenizer.decode([token], skip_special=False)
        while (mark := self._marks.end if self._inside else self._marks.start) in self._held:
            self._held = self._held.partition(mark)[2]
            self._inside = not self._inside
        self._held = self._held[-len(mark) :]
