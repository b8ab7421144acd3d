"""From what a strategy gives out to streamed tokens and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemos.decoding.strategy import Emitted, FinishedSequence
from mnemos.engine.completion import Choice, StreamedToken

if TYPE_CHECKING:
    from mnemos.text.incremental import IncrementalDecoder
    from mnemos.text.tokenizer import Tokenizer


class Assembler:
    """Turns what a strategy gives out into streamed tokens and choices; without a tokenizer, texts are empty."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.choices: list[Choice] = []
        self._emitted: dict[int, list[Emitted]] = {}
        self._texts: dict[int, str] = {}
        self._decoders: dict[int, IncrementalDecoder] = {}

    def stream(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> list[StreamedToken]:
        """The next tokens of the stream."""
        ends = {one.sequence: one for one in finished}
        tokens = [*emitted, *(token for one in finished for token in one.emitted)]
        streamed = []
        for position, token in enumerate(tokens):
            self._emitted.setdefault(token.sequence, []).append(token)
            piece, reason = self._piece(token), None
            last = all(later.sequence != token.sequence for later in tokens[position + 1 :])
            if last and token.sequence in ends:
                end = ends.pop(token.sequence)
                piece += self._rest(end, piece)
                reason = end.finish_reason
            self._texts[token.sequence] = self._texts.get(token.sequence, "") + piece
            streamed.append(
                StreamedToken(piece, token.token_id, token.logprob, token.top_logprobs, token.sequence, reason)
            )
        for end in ends.values():
            rest = self._rest(end, "")
            self._texts[end.sequence] = self._texts.get(end.sequence, "") + rest
            streamed.append(StreamedToken(rest, None, sequence=end.sequence, finish_reason=end.finish_reason))
        for end in finished:
            self.choices.append(self._choice(end, self._texts[end.sequence]))
        return streamed

    def collect(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None:
        """The same without a stream: texts are decoded at once."""
        for token in emitted:
            self._emitted.setdefault(token.sequence, []).append(token)
        for end in finished:
            if end.emitted:
                self._emitted[end.sequence] = end.emitted
            self.choices.append(self._choice(end, self._whole_text(end)))

    def abandon(self) -> None:
        """The request was cancelled: what there is becomes choices."""
        ended = {choice.index for choice in self.choices}
        for sequence, tokens in self._emitted.items():
            if sequence not in ended:
                ids = [token.token_id for token in tokens]
                text = self._texts.get(sequence)
                if text is None:
                    shown = [token.text for token in tokens]
                    held = any(piece is not None for piece in shown)
                    text = "".join(piece or "" for piece in shown) if held else self._decode(ids)
                self.choices.append(self._choice(FinishedSequence(ids, "cancelled", sequence=sequence), text))
        if not self.choices:
            self.choices.append(Choice("", [], "cancelled"))

    def _piece(self, token: Emitted) -> str:
        if token.text is not None or self.tokenizer is None:
            return token.text or ""
        decoder = self._decoders.get(token.sequence)
        if decoder is None:
            decoder = self._decoders[token.sequence] = self.tokenizer.decoder(continues=True)
        return decoder.push(token.token_id)

    def _rest(self, end: FinishedSequence, piece: str) -> str:
        """What of a finished text was not streamed before or with `piece`."""
        if end.text is not None:
            return end.text[len(self._texts.get(end.sequence, "")) + len(piece) :]
        decoder = self._decoders.get(end.sequence)
        if decoder is not None:
            return decoder.finish()
        return "" if self._emitted.get(end.sequence) else self._whole_text(end)

    def _whole_text(self, end: FinishedSequence) -> str:
        return end.text if end.text is not None else self._decode(end.tokens[: end.text_tokens])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, continues=True) if self.tokenizer is not None else ""

    def _choice(self, end: FinishedSequence, text: str) -> Choice:
        tokens = self._emitted.get(end.sequence, [])
        asked = bool(tokens) and tokens[0].logprob is not None
        return Choice(
            text=text,
            token_ids=end.tokens,
            finish_reason=end.finish_reason,
            logprobs=[token.logprob for token in tokens if token.logprob is not None],
            top_logprobs=[token.top_logprobs for token in tokens] if asked else [],
            score=end.score,
            stopped_by=end.stopped_by,
            index=end.sequence,
        )
