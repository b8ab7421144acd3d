"""From a strategy's output to streamed tokens and to a finished request's choices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.engine.completion import Choice, StreamedToken

if TYPE_CHECKING:
    from mnemos.text.incremental import IncrementalDecoder
    from mnemos.text.tokenizer import Tokenizer

Delivery = tuple[list[Emitted], list[FinishedSequence]]


class TextStream:
    """Turns a strategy's output into streamed tokens; without a tokenizer, texts are empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._shown: dict[int, int] = {}  # characters of each result's text
        self._decoders: dict[int, IncrementalDecoder] = {}

    def push(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> list[StreamedToken]:
        """The next tokens of the stream."""
        ends = {one.sequence: one for one in finished}
        tokens = [*emitted, *(token for one in finished for token in one.emitted)]
        streamed = []
        for position, token in enumerate(tokens):
            piece, reason = self._piece(token), None
            last = all(later.sequence != token.sequence for later in tokens[position + 1 :])
            if last and token.sequence in ends:
                end = ends.pop(token.sequence)
                piece += self._rest(end, piece)
                reason = end.finish_reason
            self._shown[token.sequence] = self._shown.get(token.sequence, 0) + len(piece)
            streamed.append(
                StreamedToken(piece, token.token_id, token.logprob, token.top_logprobs, token.sequence, reason)
            )
        for end in ends.values():
            rest = self._rest(end, "")
            streamed.append(StreamedToken(rest, None, sequence=end.sequence, finish_reason=end.finish_reason))
        return streamed

    def _piece(self, token: Emitted) -> str:
        if token.text is not None or self._tokenizer is None:
            return token.text or ""
        decoder = self._decoders.get(token.sequence)
        if decoder is None:
            decoder = self._decoders[token.sequence] = self._tokenizer.decoder(continues=True)
        return decoder.push(token.token_id)

    def _rest(self, end: FinishedSequence, piece: str) -> str:
        """The part of a finished text that was not streamed before or with `piece`."""
        if end.text is not None:
            return end.text[self._shown.get(end.sequence, 0) + len(piece) :]
        decoder = self._decoders.get(end.sequence)
        if decoder is not None:
            return decoder.finish()
        return "" if end.sequence in self._shown else _text_of(end, self._tokenizer)


def choices_of(deliveries: Iterable[Delivery], tokenizer: Tokenizer | None) -> list[Choice]:
    """The results in the order of their numbers; unfinished texts are those of a cancelled request."""
    emitted: dict[int, list[Emitted]] = {}
    choices: dict[int, Choice] = {}
    for tokens, finished in deliveries:
        for token in tokens:
            emitted.setdefault(token.sequence, []).append(token)
        for end in finished:
            if end.emitted:
                emitted[end.sequence] = end.emitted
            choices[end.sequence] = _choice(end, emitted.get(end.sequence, []), _text_of(end, tokenizer))
    for sequence, own in emitted.items():
        if sequence not in choices:
            cut = FinishedSequence([token.token_id for token in own], "cancelled", sequence=sequence)
            held = any(token.text is not None for token in own)
            text = "".join(token.text or "" for token in own) if held else _text_of(cut, tokenizer)
            choices[sequence] = _choice(cut, own, text)
    return [choices[sequence] for sequence in sorted(choices)] or [Choice("", [], "cancelled")]


def _text_of(end: FinishedSequence, tokenizer: Tokenizer | None) -> str:
    if end.text is not None or tokenizer is None:
        return end.text or ""
    return tokenizer.decode(end.tokens[: end.text_tokens], continues=True)


def _choice(end: FinishedSequence, tokens: list[Emitted], text: str) -> Choice:
    asked = bool(tokens) and tokens[0].logprob is not None
    return Choice(
        text=text,
        token_ids=end.tokens,
        finish_reason=end.finish_reason,
        logprobs=[token.logprob for token in tokens if token.logprob is not None],
        top_logprobs=[token.top_logprobs for token in tokens] if asked else [],
        score=end.score,
        stopped_by=end.stopped_by,
        error=end.error,
        index=end.sequence,
    )
