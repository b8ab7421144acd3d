"""A `tokenizer.json`: its vocabulary, its added tokens, and its encoder in the native core or in the library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.errors import FormatError, UnsupportedError
from mnemos.native import core
from mnemos.text.encoder import AddedToken, Encoder, Pipeline, Step, compile_encoder
from mnemos.text.library import library_errors, read, require_tokenizers, wrap_file
from mnemos.text.pieces import PieceTexts

if TYPE_CHECKING:
    import tokenizers

    from mnemos._native import Pieces, TextModel, TokenizerJson

_SPARSEST = 16  # ids may be this many times as many as tokens; a file beyond that is only after our memory
_SMALLEST = 1 << 16
_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
Missing = Sequence[tuple[str, int | None, bool]]  # text, id if one is stated, whether it is special


@dataclass(frozen=True)
class Source:
    """What a tokenizer.json says.

    texts: each id's text, "" for an unused one. silent_ids: the unused ones. decoder: the field of that name.
    surrounds: the encoder puts special tokens around a text.
    """

    texts: Sequence[str]
    silent_ids: frozenset[int]
    find: Callable[[str], int | None]
    added: Sequence[AddedToken]
    decoder: Step | None
    surrounds: bool
    encoder: Encoder


def read_source(file: Path, content: str, missing: Missing) -> Source:
    """The parts of `file`, which has this content, with the tokens in `missing` added after all others.

    It is read by the native core, or by the `tokenizers` library where it asks for what the core does not know.
    FormatError for a damaged file; MissingDependencyError where the library is needed and not installed.
    """
    what = f"{file}: is not a tokenizer.json that can be read"
    try:
        if core is None:
            raise UnsupportedError("without the native core, its tokenizer needs a library")
        return _read_compiled(file, content, missing)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from error
    except UnsupportedError as error:
        require_tokenizers(str(file), str(error))
        with library_errors(what):
            return _read_by_library(file, content, missing)


@dataclass
class _AddedTokens:
    """Added tokens get ids as the library gives them: that of the model's token, or the next one after all."""

    pieces: Pieces
    count: int  # of the model's tokens
    by_text: dict[str, AddedToken] = field(default_factory=dict)

    def find(self, text: str) -> int | None:
        known = self.by_text.get(text)
        if known is not None:
            return known.id
        piece = self.pieces.find(text)
        return piece if piece >= 0 else None

    def at(self, number: int) -> str:
        """The model's token with that id; "" if there is none."""
        return self.pieces.text(number) if number < len(self.pieces) else ""

    def add(self, token: AddedToken) -> None:
        """Adds a token; its id is ignored."""
        if not token.text:
            return
        number = self.find(token.text)
        if number is None:
            last = max((known.id for known in self.by_text.values()), default=-1)
            number = last + 1 if last >= self.count or (self.count == 0 and self.by_text) else self.count
            if self.at(number):
                raise UnsupportedError(f"the added token {token.text[:80]!r} gets an id that the model uses")
        token = token._replace(id=number)
        if self.by_text.setdefault(token.text, token) != token:
            raise UnsupportedError(f"the added token {token.text[:80]!r} is there twice")

    @property
    def size(self) -> int:
        """How many tokens there are together."""
        return self.count + sum(self.pieces.find(text) < 0 for text in self.by_text)


def _read_compiled(file: Path, content: str, missing: Missing) -> Source:
    assert core is not None
    source = core.TokenizerJson(content.encode())
    try:
        rest = json.loads(source.rest)
    except (ValueError, RecursionError) as error:
        raise FormatError(str(error)) from error
    model = rest.get("model")
    if not isinstance(model, dict):
        raise FormatError(f"model is {str(model)[:80]}; it must be an object")
    kind = model.get("type")
    if kind is None:
        raise UnsupportedError("the model's type is not stated")
    if kind not in _KINDS:
        raise FormatError(f"model.type is {str(kind)[:80]!r}; it must be one of {', '.join(_KINDS)}")
    if source.scored != (kind == "Unigram") and source.count:
        raise FormatError(f"model.vocab is not what a {kind} model has")
    _check_ids(source.count, source.last + 1)
    try:
        pieces = source.pieces()
    except FormatError as error:
        raise UnsupportedError(f"model.vocab {error}") from error
    added = _AddedTokens(pieces, source.count)
    for entry in rest.get("added_tokens") or ():
        added.add(_added_token(entry))
    _add_missing(file, missing, added.find, lambda: added.size, added.add)
    steps = {name: rest.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    for name, step in steps.items():
        if step is not None and not isinstance(step, dict):
            raise FormatError(f"{name} is {str(step)[:80]!r}; it must be an object")
    tokens = sorted(added.by_text.values(), key=lambda token: token.id)
    pipeline = Pipeline(**steps, added=tokens, special_splits=True)
    texts = PieceTexts(pieces, {token.id: token.text for token in tokens})
    unused = {*pieces.empty_numbers(), *range(len(pieces), len(texts))} - {token.id for token in tokens}
    return Source(
        texts=texts,
        silent_ids=frozenset(unused),
        find=added.find,
        added=tokens,
        decoder=rest.get("decoder"),
        surrounds=pipeline.post_processor is not None,
        encoder=compile_encoder(_model(source, pieces, kind, model), pipeline),
    )


def _check_ids(count: int, size: int) -> None:
    if not count:
        raise FormatError("model.vocab is empty; a tokenizer needs at least one token")
    if size > max(_SPARSEST * count, _SMALLEST):
        raise FormatError(f"model.vocab has {count} tokens, but an id of {size - 1}; ids must be dense")


def _added_token(entry: Any) -> AddedToken:
    text = entry.get("content") if isinstance(entry, dict) else None
    flags: dict[str, Any] = {name: entry.get(name) for name in _FLAGS} if isinstance(entry, dict) else {}
    if not isinstance(text, str) or any(type(flag) is not bool for flag in flags.values()):
        raise FormatError(f"added_tokens has {str(entry)[:200]}; it must have a content and {', '.join(_FLAGS)}")
    return AddedToken(text, -1, **flags)


def _model(source: TokenizerJson, pieces: Pieces, kind: str, model: Mapping[str, Any]) -> TextModel:
    assert core is not None
    if kind == "Unigram":
        unknown = model.get("unk_id")
        if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(pieces)):
            raise FormatError(f"model.unk_id is {str(unknown)[:80]}; the vocabulary has {len(pieces)} tokens")
        return source.unigram(pieces, -1 if unknown is None else unknown, _option(model, "byte_fallback", False))
    name = model.get("unk_token")
    if name is not None and not isinstance(name, str):
        raise FormatError(f"model.unk_token is {str(name)[:80]}; it must be a string")
    unknown = pieces.find(name) if name else -1
    if kind == "WordLevel":
        return core.word_level(pieces, unknown)
    prefix = _option(model, "continuing_subword_prefix", "")
    if kind == "WordPiece":
        longest = _option(model, "max_input_chars_per_word", 100)
        if longest < 0:
            raise FormatError(f"model.max_input_chars_per_word is {longest}; it must be at least 0")
        return core.word_piece(pieces, unknown, prefix, longest)
    if model.get("dropout") or (name is not None and unknown < 0):
        raise UnsupportedError("the model's dropout or unknown token is not supported")
    flags = [_option(model, flag, False) for flag in ("fuse_unk", "byte_fallback", "ignore_merges")]
    return source.bpe(pieces, (unknown, *flags, prefix, _option(model, "end_of_word_suffix", "")))


def _option(model: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of the model; `default` if it is null or missing."""
    value = model.get(name)
    if value is None:
        return default
    if type(value) is not type(default):
        raise FormatError(f"model.{name} is {str(value)[:80]!r}; it must be of type {type(default).__name__}")
    return value


def _add_missing(
    file: Path,
    missing: Missing,
    find: Callable[[str], int | None],
    size: Callable[[], int],
    add: Callable[[AddedToken], None],
) -> None:
    """Adds the tokens that only the files beside this one have, in the order of their ids, those without one last."""
    for text, stated, special in sorted(missing, key=lambda entry: (entry[1] is None, entry[1] or 0)):
        if find(text) is not None:
            continue
        if stated not in (None, size()):
            problem = f"adds {text[:80]!r} as {stated}, which is ignored: the next free id is {size()}"
            warnings.warn(f"{file.parent}: a file beside {file.name} {problem}", stacklevel=2)
            continue
        add(AddedToken(text, -1, special))


def _read_by_library(file: Path, content: str, missing: Missing) -> Source:
    encoder = read(content)

    def add(token: AddedToken) -> None:
        from tokenizers import AddedToken as LibraryToken

        encoder.add_tokens([LibraryToken(token.text, special=token.special, normalized=False)])

    _add_missing(file, missing, encoder.token_to_id, lambda: encoder.get_vocab_size(with_added_tokens=True), add)
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    _check_ids(len(vocabulary), size)
    texts = [""] * size
    for text, token in vocabulary.items():
        texts[token] = text
    return Source(
        texts=texts,
        silent_ids=frozenset(token for token, text in enumerate(texts) if not text),
        find=encoder.token_to_id,
        added=[_of_library(token, entry) for token, entry in sorted(encoder.get_added_tokens_decoder().items())],
        decoder=None if encoder.decoder is None else json.loads(encoder.decoder.__getstate__()),
        surrounds=encoder.post_processor is not None,
        encoder=wrap_file(content, encoder),
    )


def _of_library(token: int, entry: tokenizers.AddedToken) -> AddedToken:
    return AddedToken(
        entry.content, token, entry.special, entry.single_word, entry.lstrip, entry.rstrip, entry.normalized
    )
