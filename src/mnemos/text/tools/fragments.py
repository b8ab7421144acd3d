"""What the text of an answer turns out to be, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """A part of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of what the model wrote before its answer, for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallName:
    """The beginning of a tool call: the name of the tool."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the call's arguments, JSON text."""

    text: str


Fragment = Text | Reasoning | CallName | CallArguments
