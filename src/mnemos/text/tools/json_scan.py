"""The extent of a JSON value in a text that is still arriving, in linear time and without parsing it."""

from __future__ import annotations


class ValueScan:
    """Finds the end of one JSON value; feed it the text once, in pieces of any size.

    Objects, lists and strings end at their own last character; numbers and literals end before the first character
    that cannot be a part of them.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._bare = False
        self.started = False
        self.done = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value; white space before it counts."""
        for position, character in enumerate(text):
            if self._take(character):
                continue
            return position + (0 if self._bare else 1)
        return len(text)

    def _take(self, character: str) -> bool:
        """Takes a character; False if the value ends with it (or, for a bare one, before it)."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
                return self._goes_on()
        elif self._bare:
            if character in ",]} \t\r\n":
                self.done = True
                return False
        elif character in "{[":
            self.started = True
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._goes_on()
        elif character == '"':
            self.started = self._in_string = True
        elif not character.isspace() and not self.started:
            self.started = self._bare = True
        return True

    def _goes_on(self) -> bool:
        self.done = self._depth <= 0
        return not self.done
