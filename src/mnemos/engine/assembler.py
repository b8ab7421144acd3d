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

    def __init__(self, tokenizer: Tokenizer | None, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown: dict[int, int] = {}  # characters of each result's text
        self._decoders: dict[int, IncrementalDecoder] = {}

    def push(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> list[StreamedToken]:
        """The next tokens of the stream."""
        if not finished and len(emitted) == 1:  # what most steps bring
            (token,) = emitted
            piece, sequence = self._piece(token), token.sequence
            offset = self._shown.get(sequence, 0)
            self._shown[sequence] = offset + len(piece)
            return [StreamedToken(piece, token.token_id, token.logprob, token.top_logprobs, sequence, None, offset)]
        ends = {one.sequence: one for one in finished}
        wholes = {one.sequence: self._text_of(one) for one in finished if one.emitted}  # texts that come all at once
        tokens = [*emitted, *(token for one in finished for token in one.emitted)]
        streamed = []
        for position, token in enumerate(tokens):
            piece, sequence = self._piece(token), token.sequence
            offset = self._shown.get(sequence, 0)
            if sequence in wholes:  # its last tokens may be no part of it
                piece = piece[: max(len(wholes[sequence]) - offset, 0)]
            last = all(later.sequence != sequence for later in tokens[position + 1 :])
            end = ends.pop(sequence, None) if last else None
            if end is not None:
                piece += self._rest(end, piece)
            self._shown[sequence] = offset + len(piece)
            own = StreamedToken(piece, token.token_id, token.logprob, token.top_logprobs, sequence, text_offset=offset)
            streamed.append(own if end is None else _ended(own, end))
        for end in ends.values():
            rest, offset = self._rest(end, ""), self._shown.get(end.sequence, 0)
            streamed.append(_ended(StreamedToken(rest, None, sequence=end.sequence, text_offset=offset), end))
        return streamed

    def _piece(self, token: Emitted) -> str:
        if token.text is not None or self._tokenizer is None:
            return token.text or ""
        decoder = self._decoders.get(token.sequence)
        if decoder is None:
            decoder = self._decoders[token.sequence] = self._tokenizer.decoder(self._skip_special, continues=True)
        return decoder.push(token.token_id)

    def _rest(self, end: FinishedSequence, piece: str) -> str:
        """The part of a finished text that was not streamed before or with `piece`."""
        if end.text is not None or end.emitted:
            return self._text_of(end)[self._shown.get(end.sequence, 0) + len(piece) :]
        decoder = self._decoders.get(end.sequence)
        if decoder is not None:
            return decoder.finish()
        return "" if end.sequence in self._shown else self._text_of(end)

    def _text_of(self, end: FinishedSequence) -> str:
        return _text_of(end, self._tokenizer, self._skip_special)


def _ended(token: StreamedToken, end: FinishedSequence) -> StreamedToken:
    """A result's last token."""
    ends_only = token.token_id is not None and end.text_tokens is not None and end.text_tokens < len(end.tokens)
    return token._replace(
        finish_reason=end.finish_reason, stopped_by=end.stopped_by, error=end.error, ends_only=ends_only
    )


def choices_of(deliveries: Iterable[Delivery], tokenizer: Tokenizer | None, skip_special: bool = True) -> list[Choice]:
    """The results in the order of their numbers; unfinished texts are those of a cancelled request."""
    emitted: dict[int, list[Emitted]] = {}
    ends: dict[int, FinishedSequence] = {}
    for tokens, finished in deliveries:
        for token in tokens:
            emitted.setdefault(token.sequence, []).append(token)
        for end in finished:
            if end.emitted:
                emitted[end.sequence] = end.emitted
            ends[end.sequence] = end
    for sequence, own in emitted.items():
        if sequence not in ends:
            held = any(token.text is not None for token in own)
            text = "".join(token.text or "" for token in own) if held else None
            ends[sequence] = FinishedSequence(
                [token.token_id for token in own], "cancelled", sequence=sequence, text=text
            )
    choices = [_choice(ends[one], emitted.get(one, []), tokenizer, skip_special) for one in sorted(ends)]
    return choices or [Choice("", [], "cancelled")]


def _text_of(end: FinishedSequence, tokenizer: Tokenizer | None, skip_special: bool) -> str:
    if end.text is not None or tokenizer is None:
        return end.text or ""
    return tokenizer.decode(end.tokens[: end.text_tokens], skip_special, continues=True)


def _offsets(tokens: list[Emitted], text: str, tokenizer: Tokenizer, skip_special: bool) -> list[int]:
    """How many characters of the text come before each token."""
    decoder, length, offsets = tokenizer.decoder(skip_special, continues=True), 0, []
    for token in tokens:
        offsets.append(min(length, len(text)))
        length += len(decoder.push(token.token_id))
    return offsets


def _choice(end: FinishedSequence, tokens: list[Emitted], tokenizer: Tokenizer | None, skip_special: bool) -> Choice:
    asked = bool(tokens) and tokens[0].logprob is not None
    text = _text_of(end, tokenizer, skip_special)
    return Choice(
        text=text,
        token_ids=end.tokens,
        finish_reason=end.finish_reason,
        logprobs=[token.logprob for token in tokens if token.logprob is not None],
        top_logprobs=[token.top_logprobs for token in tokens] if asked else [],
        text_offsets=_offsets(tokens, text, tokenizer, skip_special) if asked and tokenizer is not None else [],
        score=end.score,
        stopped_by=end.stopped_by,
        error=end.error,
        index=end.sequence,
    )
