"""Splits an answer into reasoning, text and tool calls while it arrives, in linear time."""

from __future__ import annotations

from mnemos.text.tools.families import Family, Thinking
from mnemos.text.tools.forms import CallReader, Schemas
from mnemos.text.tools.fragments import CallName, Fragment, Reasoning, Text

LONGEST_CALL = 1 << 20  # characters; more is no call


class AnswerReader:
    """Reads one answer; the fragments' texts add up to it, without marks and the white space around them.

    family    how calls are written; None: there are no calls
    thinking  the marks of reasoning; None: there is none
    schemas   the tools' parameters, by their names
    inside    the prompt has opened the reasoning already
    """

    def __init__(
        self, family: Family | None, thinking: Thinking | None, schemas: Schemas, *, inside: bool = False
    ) -> None:
        self._family = family
        self._thinking = thinking
        self._schemas = schemas
        self._marks = _marks_of(family, thinking)
        self._held = ""  # may be the beginning of a mark, or white space before one
        self._reasons = inside and thinking is not None
        self._call: CallReader | None = None
        self._lead = ""  # white space and mark before the call, which belong to the text if it is none
        self._raw: list[str] = []  # of the call that is being read
        self._raw_length = 0
        self._named = False  # the call has given its name away, and cannot become text any more
        self._thought = False  # some of the reasoning was passed on
        self._begun = False  # something other than white space has come
        self._moved = False  # the last step went past a mark, and more may follow
        self.calls = 0
        self.open = False  # the answer ended in the middle of a call

    def push(self, text: str) -> list[Fragment]:
        """The fragments that `text` completes."""
        self._held += text
        fragments: list[Fragment] = []
        while True:
            step = self._in_call() if self._call else self._in_reasoning() if self._reasons else self._in_text()
            fragments += step
            if not self._moved:
                return fragments

    def finish(self) -> list[Fragment]:
        """The rest, once the answer is over."""
        if self._call is not None:
            complete = not self._family or not self._family.end
            fragments = self._feed(self._held)
            self._held = ""
            if self._call is not None:
                self.open = not complete
                fragments += self._end_call()
            return fragments
        rest, self._held = self._held, ""
        if self._reasons:
            return [Reasoning(rest.rstrip())] if rest.strip() else []
        return [Text(rest)] if rest and (self._begun or rest.strip()) and not (self.calls and not rest.strip()) else []

    def _in_reasoning(self) -> list[Fragment]:
        assert self._thinking is not None
        before, found, after = self._held.partition(self._thinking.end)
        self._moved = bool(found)
        if found:
            self._reasons, self._held = False, after.lstrip()
            self._begun = bool(self._held)
            before = before.rstrip() if self._thought else before.strip()
            return [Reasoning(before)] if before else []
        return self._release(self._held, (self._thinking.end,), Reasoning)

    def _in_text(self) -> list[Fragment]:
        self._moved = False
        marks, family = self._marks, self._family
        if not self._begun:
            self._held = self._held.lstrip() if marks else self._held
            if marks and not self._held:
                return []
            self._begun = True
            if family is not None and self._held.startswith(family.opens or ("\0",)):
                self._moved = True
                self._start_call("")
                return []
        first = min((at for mark in marks if (at := self._held.find(mark)) >= 0), default=-1)
        if first < 0:
            return self._release(self._held, marks, Text)
        mark = next(one for one in marks if self._held.startswith(one, first))
        whole, self._held = self._held[:first], self._held[first + len(mark) :]
        before = whole.rstrip()
        self._moved = True
        fragments: list[Fragment] = [Text(before)] if before else []
        self._begun = self._begun or bool(before)
        if self._thinking is not None and mark == self._thinking.start:
            self._reasons = True
            self._held = self._held.lstrip()
        elif self._thinking is not None and mark == self._thinking.end:  # the prompt had opened it
            return [Reasoning(before)] if before else []
        elif family is not None and mark == family.start:
            self._start_call(whole[len(before) :] + mark)
        return fragments

    def _start_call(self, lead: str) -> None:
        assert self._family is not None
        self._call = self._family.reader(self._schemas)
        self._lead = lead
        self._raw, self._raw_length, self._named = [], 0, False

    def _in_call(self) -> list[Fragment]:
        assert self._family is not None
        self._moved = False
        end = self._family.end or self._family.start  # without an end, the next call's mark ends a call
        if not end:
            text, self._held = self._held, ""
            return self._feed(text)
        before, found, after = self._held.partition(end)
        if not found:
            keep = _overlap(self._held, (end,))
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            return self._feed(text)
        self._moved, self._held = True, after
        fragments = self._feed(before)
        if self._call is None:  # it was none, and so the mark is text too
            self._held = end + after
            return fragments
        fragments += self._end_call()
        if not self._family.end:
            self._start_call(end)
        else:
            self._held = self._held.lstrip("\n")
        return fragments

    def _feed(self, text: str) -> list[Fragment]:
        """Passes text to the call's reader; if it is no call after all, gives it back as text."""
        assert self._call is not None
        if not text:
            return []
        self._raw.append(text)
        self._raw_length += len(text)
        try:
            if self._raw_length > LONGEST_CALL:
                raise ValueError("too long")
            return self._seen(self._call.push(text))
        except (ValueError, RecursionError):
            return self._no_call()

    def _end_call(self) -> list[Fragment]:
        assert self._call is not None
        try:
            fragments = self._seen(self._call.finish())
        except (ValueError, RecursionError):
            return self._no_call(closed=True)
        self._call = None
        return fragments

    def _seen(self, fragments: list[Fragment]) -> list[Fragment]:
        names = sum(isinstance(fragment, CallName) for fragment in fragments)
        self.calls += names
        self._named = self._named or names > 0
        return fragments

    def _no_call(self, closed: bool = False) -> list[Fragment]:
        """What looked like a call is text, unless a part of it was passed on as a call already."""
        assert self._family is not None
        self._call = None
        if self._named:
            return []
        raw = self._lead + "".join(self._raw) + (self._family.end if closed and not self.open else "")
        self._begun = True
        return [Text(raw)]

    def _release(self, text: str, marks: tuple[str, ...], kind: type[Text] | type[Reasoning]) -> list[Fragment]:
        """Passes on what cannot be a part of a mark, or white space before one."""
        keep = _overlap(text, marks)
        if marks:
            free = text[: len(text) - keep]
            keep += len(free) - len(free.rstrip())
        released, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if kind is Reasoning and not self._thought:
            released = released.lstrip()
            self._thought = bool(released)
        return [kind(released)] if released else []


def _marks_of(family: Family | None, thinking: Thinking | None) -> tuple[str, ...]:
    """All marks that may stand in an answer, outside calls and reasoning."""
    marks: list[str] = []
    if family is not None:
        marks += [family.start] if family.start else []
        marks += family.around
    if thinking is not None:
        marks += [thinking.start, thinking.end]
    return tuple(marks)


def _overlap(text: str, marks: tuple[str, ...]) -> int:
    """The length of the longest end of `text` with which a mark begins."""
    longest = min(max((len(mark) for mark in marks), default=1) - 1, len(text))
    for length in range(longest, 0, -1):
        end = text[len(text) - length :]
        if any(mark.startswith(end) for mark in marks):
            return length
    return 0
