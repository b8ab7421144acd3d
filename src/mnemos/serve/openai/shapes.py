"""OpenAI's response objects: usage, log probabilities, chunks."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from mnemos.engine.completion import StreamedToken, Usage
from mnemos.text.tokenizer import Tokenizer


def new_id(kind: str) -> str:
    """An id that no client chose and that tells nothing."""
    return f"{kind}-{secrets.token_hex(12)}"


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
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
