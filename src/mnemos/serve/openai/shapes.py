"""OpenAI's response objects: usage, log probabilities, chunks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mnemos.decoding.prompt_scores import ScoredToken
from mnemos.engine.answers import End, Piece
from mnemos.engine.completion import StreamedToken, Usage
from mnemos.serve.generation import Running
from mnemos.serve.openai.types import FINISHES
from mnemos.serve.refusal import Refusal
from mnemos.serve.streams import encode
from mnemos.text.tokenizer import Tokenizer
from mnemos.version import __version__

FINGERPRINT = f"mnemos-{__version__}"
_MARK = "\x00"  # stands for the text where a chunk's other parts are written
LEAST = -9999.0  # JSON has no infinities


def new_id(beginning: str) -> str:
    """An id that no client chose and that tells nothing but its kind."""
    return beginning + secrets.token_hex(12)


class Frames:
    """Chunks of which only the text is new: everything around it is written once for each result and kind.

    write: a piece's whole chunk. Its text must come after all other texts that a client chose.
    """

    def __init__(self, write: Callable[[Piece], str]) -> None:
        self._write = write
        self._frames: dict[tuple[int, str], tuple[str, str]] = {}

    def chunk(self, piece: Piece) -> str:
        """The chunk of a piece; what else its tokens tell is not shown."""
        key = piece.sequence, piece.kind
        frame = self._frames.get(key)
        if frame is None:
            before, after = self._write(Piece(piece.sequence, _MARK, (), piece.kind)).rsplit(encode(_MARK), 1)
            frame = self._frames[key] = before, after
        return frame[0] + encode(piece.text) + frame[1]


def usage_object(usage: Usage, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """Numbers of tokens."""
    shown: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if reasoning_tokens is not None:
        shown["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return shown


def logprob_entries(tokens: Iterable[StreamedToken], tokenizer: Tokenizer, top: int) -> list[dict[str, Any]]:
    """`logprobs.content` of chat: each token of the text with its bytes and `top` alternatives."""
    return [
        {
            **_entry(token.token_id, token.logprob, tokenizer),
            "top_logprobs": [_entry(other, logprob, tokenizer) for other, logprob in token.top_logprobs[:top]],
        }
        for token in tokens
        if token.token_id is not None and token.logprob is not None and not token.ends_only
    ]


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


@dataclass
class OldLogprobs:
    """`logprobs` of plain completions: four lists with an entry for each token."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, scored: ScoredToken, offset: int, tokenizer: Tokenizer, top: int) -> None:
        """Adds a token, whose text begins at `offset`, with its `top` alternatives and itself among them."""
        own = token_name(scored.token_id, tokenizer)
        self.tokens.append(own)
        self.text_offset.append(offset)
        if scored.logprob is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        shown = {token_name(token, tokenizer): max(value, LEAST) for token, value in scored.top_logprobs[:top]}
        self.token_logprobs.append(max(scored.logprob, LEAST))
        self.top_logprobs.append({**shown, own: max(scored.logprob, LEAST)})


def token_name(token_id: int, tokenizer: Tokenizer) -> str:
    """A token's text; bytes that are not characters of their own as OpenAI writes them, `bytes:\\xe2\\x80`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(running: Running) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt but the first, candidates by their ids."""
    tokenizer = running.model.engine.tokenizer
    shown: list[dict[str, Any] | None] = []
    for scored in running.handle.prompt_logprobs:
        ranked = {token: (value, rank) for rank, (token, value) in enumerate(scored.top_logprobs, 1)}
        if scored.logprob is None:
            shown.append(None)
            continue
        ranked.setdefault(scored.token_id, (scored.logprob, 0))
        shown.append(
            {
                str(token): {
                    "logprob": max(value, LEAST),
                    "rank": rank or None,
                    "decoded_token": None if tokenizer is None else token_name(token, tokenizer),
                }
                for token, (value, rank) in ranked.items()
            }
        )
    return shown


def finish(end: End) -> dict[str, Any]:
    """The end of a choice; `stop_reason` is vLLM's: the string or token that ended it."""
    shown: dict[str, Any] = {"finish_reason": FINISHES[end.reason], "stop_reason": end.stopped_by}
    return shown if end.error is None else {**shown, "error": end.error}


def failed(refusal: Refusal) -> str:
    """The events that end a stream after a failure."""
    return f"data: {encode(refusal.body('/v1/'))}\n\ndata: [DONE]\n\n"
