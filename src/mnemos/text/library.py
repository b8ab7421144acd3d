"""Encoders of the `tokenizers` library: for files that ask for what the native core does not know, or without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mnemos.errors import FormatError, MissingDependencyError, RequestError

if TYPE_CHECKING:
    import tokenizers

    from mnemos.text.encoder import Pipeline

_EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


class LibraryEncoder:
    """Two tokenizers: `encoder` recognises every special token that is written in a text, for `plain` their names are
    text like any other. moved_ids: ids that they use for others."""

    def __init__(
        self, encoder: tokenizers.Tokenizer, plain: tokenizers.Tokenizer, moved_ids: dict[int, int] | None = None
    ) -> None:
        self._encoder = encoder
        self._plain = plain
        self._moved_ids = moved_ids or {}

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """See `Encoder`."""
        encoder = self._encoder if parse_special else self._plain
        try:
            ids: list[int] = encoder.encode(text, add_special_tokens=add_special).ids
        except BaseException as error:  # the library's panics are not of type Exception
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise RequestError(str(error)[:400]) from error
        return [self._moved_ids.get(token, token) for token in ids] if self._moved_ids else ids


def require_tokenizers(label: str, reason: str) -> Any:
    """The library. MissingDependencyError if it is not installed; `reason` says what it is needed for in this file."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            f"{label}: {reason}; the tokenizers library can read it: pip install 'mnemos[tokenizers]'"
        ) from error
    return tokenizers


def wrap_model(model: Any, pipeline: Pipeline) -> LibraryEncoder:
    """An encoder of one of the library's models."""
    import json

    from tokenizers import AddedToken, Tokenizer

    steps = {
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": pipeline.post_processor,
    }
    made = encoder, plain = [Tokenizer.from_str(json.dumps({"model": _EMPTY, **steps})) for _ in range(2)]
    for tokenizer, takes_special in zip(made, (True, False), strict=True):
        tokenizer.model = model
        tokenizer.add_tokens(
            [
                AddedToken(token.text, special=token.special, normalized=False, rstrip=token.rstrip)
                for token in pipeline.added
                if takes_special or not token.special
            ]
        )
    # A token that the library does not find in the model gets an id after all others.
    moved = {encoder.token_to_id(token.text): token.id for token in pipeline.added}
    return LibraryEncoder(encoder, plain, {old: new for old, new in moved.items() if old not in (None, new)})


def wrap_file(content: str, encoder: tokenizers.Tokenizer) -> LibraryEncoder:
    """An encoder of a tokenizer.json; `encoder` was made of `content` and may have got further tokens."""
    plain = _share_model(encoder)
    added = encoder.get_added_tokens_decoder()
    if any(plain.token_to_id(entry.content) != token for token, entry in added.items()):
        plain = read(content)
    plain.encode_special_tokens = True
    return LibraryEncoder(encoder, plain)


def read(content: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _share_model(encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A second tokenizer over the same model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(encoder.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(encoder, part) is not None:
            setattr(tokenizer, part, getattr(encoder, part))
    added = encoder.get_added_tokens_decoder()
    tokenizer.add_tokens([added[token] for token in sorted(added)])
    return tokenizer


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns what the library raises on bad input, panics included, into a FormatError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise FormatError(f"{what}: {str(error)[:400]}") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise FormatError(f"{what}: {str(error)[:400]}") from error


def _is_panic(error: BaseException) -> bool:
    """Whether the library panicked, for example because a regular expression took too long on a text."""
    return type(error).__name__ == "PanicException"  # which no module exports
