"""A chat template in Go's language, for Ollama, which runs no Jinja.

Ollama has some templates of its own, and takes one of them where the model's Jinja differs from what it has listed by
less than a hundred letters; for every other model it would send texts to the model without any template, silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mnemos.errors import MnemosError
from mnemos.text.conversation import Message
from mnemos.text.tokenizer import Tokenizer

_MARKS = ("first7391", "second7391", "third7391")
# Conversations on which a template must say the same, after a system message and without one.
_TRIED = (("user",), ("user", "assistant", "user"), ("user", "assistant") * 2 + ("user",))


@dataclass(frozen=True)
class Turns:
    """What a template writes around the contents of messages.

    opening   before the first user's content
    system    before and after a system message, up to the first user's content, in place of the opening
    answer    between a user's content and the assistant's
    question  between the assistant's content and a user's
    prompt    after the last user's content
    """

    opening: str
    system: tuple[str, str]
    answer: str
    question: str
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with a user's message, as `go` gives it in Ollama."""
        start, text = self.opening, ""
        for message in messages:
            content = str(message["content"])
            if message["role"] == "system":
                start = self.system[0] + content + self.system[1]
            elif message["role"] == "user":
                text += (self.question if text else start) + content
            else:
                text += self.answer + content
        return text + self.prompt

    @property
    def go(self) -> str:
        """The template. It has no layout of its own, which Go would write too. An answer at the end is continued."""
        before, after = self.system
        start = "{{ if $.System }}" + before + "{{ $.System }}" + after + "{{ else }}" + self.opening + "{{ end }}"
        parts = ['{{ $last := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $last }}', self.question]
        parts += ["{{ else }}", start, "{{ end }}{{ .Content }}{{ $last = .Role }}"]
        parts += ['{{ else if eq .Role "assistant" }}', self.answer, "{{ .Content }}{{ $last = .Role }}"]
        parts += ['{{ end }}{{ end }}{{ if eq $last "user" }}', self.prompt, "{{ end }}"]
        return "".join(parts)


def go_template(tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat template in Go's language; None: there is none, or it does more than write around messages.

    It says the same as the model's own for the conversations that are tried. A leading bos is left to Ollama, which
    adds it where the tokenizer does.
    """
    if tokenizer.chat_template is None or "strftime_now" in tokenizer.chat_template:  # today's date is no constant
        return None
    try:
        found = _turns(tokenizer)
        if found is None:
            return None
        turns, instructed = found
        for roles in _TRIED:
            for system in (False, True) if instructed else (False,):
                messages = _conversation((("system",) if system else ()) + roles)
                if turns.render(messages) != _render(tokenizer, messages):
                    return None
    except MnemosError:  # a template that refuses such conversations
        return None
    parts = (turns.opening, *turns.system, turns.answer, turns.question, turns.prompt)
    return None if any(mark in part for part in parts for mark in ("{{", "}}", '"""')) else turns.go


def _conversation(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": f"{role} says {number}: a,\n b."} for number, role in enumerate(roles)]


def _turns(tokenizer: Tokenizer) -> tuple[Turns, bool] | None:
    """What the template writes around marks, and whether it takes system messages; None: it does not write all marks,
    in their order."""
    found = _around(tokenizer, ("user", "assistant", "user"))
    if found is None:
        return None
    opening, answer, question, prompt = found
    try:
        instructed = _around(tokenizer, ("system", "user"))
    except MnemosError:  # it refuses system messages, which Ollama's users may set all the same: see Gemma 3's template
        return Turns(opening, (opening, "\n\n"), answer, question, prompt), False
    return (
        None if instructed is None else (Turns(opening, (instructed[0], instructed[1]), answer, question, prompt), True)
    )


def _around(tokenizer: Tokenizer, roles: Sequence[str]) -> list[str] | None:
    """The texts before, between and after the marks that are the messages' contents."""
    marks = _MARKS[: len(roles)]
    messages: list[Message] = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text = _render(tokenizer, messages)
    if any(text.count(mark) != 1 for mark in marks):
        return None
    places = [text.index(mark) for mark in marks]
    if any(one > other for one, other in pairwise(places)):
        return None
    ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*places, len(text)], strict=True)]


def _render(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    text = tokenizer.apply_chat_template(messages)
    begin = tokenizer.bos_id
    if begin is None or tokenizer.encode("") != [begin]:
        return text
    return text.removeprefix(tokenizer.token_bytes(begin).decode("utf-8", "replace"))
