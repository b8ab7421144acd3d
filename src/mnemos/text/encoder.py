"""The way from text to ids: what every tokenizer does before, in and after its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mnemos.errors import FormatError, UnsupportedError
from mnemos.native import core

if TYPE_CHECKING:
    from mnemos._native import Encoder as CompiledEncoder
    from mnemos._native import TextModel

Step = Mapping[str, Any]  # of a normalizer, pre-tokenizer or post-processor, as tokenizer.json has it
_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "ByteLevel")
# Normalizers after which a text begins where it did before.
_KEEP_BEGINNING = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend")


class Encoder(Protocol):
    """Text to ids."""

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids. add_special: with what the post-processor puts around them; parse_special: names of special tokens
        mean those tokens. RequestError for a text that the model has no tokens for."""


class AddedToken(NamedTuple):
    """A token that is found in text before it is cut into words.

    single_word: only where no word goes on beside it. lstrip, rstrip: it takes the white space beside it.
    normalized: it is found in normalized text.
    """

    text: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class Pipeline(NamedTuple):
    """What surrounds a model.

    special_splits: where special tokens' names are text, nothing else is found within them either.
    """

    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None
    added: Sequence[AddedToken] = ()
    special_splits: bool = False


def compile_encoder(model: TextModel, pipeline: Pipeline) -> CompiledEncoder:
    """The native core's encoder. UnsupportedError for a step that it does not know, FormatError for a damaged one."""
    assert core is not None  # it made the model
    encoder = core.Encoder(model)
    normalizers = _flat(pipeline.normalizer, "normalizers")
    for step in normalizers:
        _normalize(encoder, step)
    plain_beginning = not normalizers or not any(token.normalized for token in pipeline.added)
    for index, step in enumerate(_flat(pipeline.pre_tokenizer, "pretokenizers")):
        _cut(encoder, step, index == 0 and plain_beginning and all(map(_keeps_beginning, normalizers)))
    before: list[int] = []
    after: list[int] = []
    for step in _flat(pipeline.post_processor, "processors"):
        first, last = _surrounding(step)
        before, after = first + before, after + last
    encoder.surround(before, after)
    found = [_row(token, False) for token in pipeline.added]
    plain = [_row(token, token.special) for token in pipeline.added if pipeline.special_splits or not token.special]
    encoder.set_added(found, plain)
    return encoder


def _row(token: AddedToken, ignored: bool) -> tuple[str, int, bool, bool, bool, bool, bool]:
    return token.text, token.id, token.single_word, token.lstrip, token.rstrip, token.normalized, ignored


def _flat(step: Step | None, parts: str) -> list[Step]:
    """The steps of a sequence; `parts` is the field that they are in."""
    if step is None:
        return []
    if _get(step, "type", str) != "Sequence":
        return [step]
    return [inner for part in _get(step, parts, list) for inner in _flat(_object(part), parts)]


def _normalize(encoder: CompiledEncoder, step: Step) -> None:
    kind = step["type"]
    if kind in _FORMS:
        encoder.normalize(kind)
    elif kind == "Strip":
        if _get(step, "strip_left", bool):
            encoder.normalize("StripLeft")
        if _get(step, "strip_right", bool):
            encoder.normalize("StripRight")
    elif kind == "Prepend":
        encoder.prepend(_get(step, "prepend", str))
    elif kind == "Replace":
        encoder.replace(*_pattern(step), _get(step, "content", str))
    elif kind == "Precompiled":
        from base64 import b64decode

        encoder.map_characters(b64decode(_get(step, "precompiled_charsmap", str), validate=True))
    elif kind == "BertNormalizer":
        lowercase = _get(step, "lowercase", bool)
        strips = step.get("strip_accents")
        strips = lowercase if strips is None else _get(step, "strip_accents", bool)
        encoder.normalize_bert(
            _get(step, "clean_text", bool), _get(step, "handle_chinese_chars", bool), strips, lowercase
        )
    else:
        raise UnsupportedError(f"the normalizer {str(kind)[:80]} is not supported")


def _keeps_beginning(step: Step) -> bool:
    return step["type"] in _KEEP_BEGINNING or (step["type"] == "Replace" and bool(step["content"]))


def _cut(encoder: CompiledEncoder, step: Step, begins: bool) -> None:
    """begins: the first word, and no other, begins where the text did before it was normalized."""
    kind = step["type"]
    if kind == "ByteLevel":
        encoder.cut_bytes(_get(step, "add_prefix_space", bool), _get(step, "use_regex", bool, True))
    elif kind == "Split":
        pattern, literal = _pattern(step)
        encoder.cut_at(pattern, literal, _get(step, "behavior", str), _get(step, "invert", bool))
    elif kind == "Metaspace":
        scheme = _get(step, "prepend_scheme", str, "always")
        if (scheme == "first" and not begins) or (step.get("add_prefix_space", True) is not True and scheme != "never"):
            raise UnsupportedError(f"the pre-tokenizer {str(dict(step))[:200]} is not supported with these normalizers")
        encoder.cut_marks(_get(step, "replacement", str), scheme, _get(step, "split", bool, True))
    elif kind == "Digits":
        encoder.cut_at_characters("numeric", "Isolated" if _get(step, "individual_digits", bool) else "Contiguous")
    elif kind == "Punctuation":
        encoder.cut_at_characters("punctuation", _get(step, "behavior", str, "Isolated"))
    elif kind == "Whitespace":
        encoder.cut_words()
    elif kind == "WhitespaceSplit":
        encoder.cut_at_characters("space", "Removed")
    elif kind == "BertPreTokenizer":
        encoder.cut_at_characters("space", "Removed")
        encoder.cut_at_characters("punctuation", "Isolated")
    elif kind == "CharDelimiterSplit":
        encoder.cut_at(_get(step, "delimiter", str), True, "Removed", False)
    else:
        raise UnsupportedError(f"the pre-tokenizer {str(kind)[:80]} is not supported")


def _surrounding(step: Step) -> tuple[list[int], list[int]]:
    """Ids before and after a text."""
    kind = step["type"]
    if kind == "ByteLevel":
        return [], []
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [_id(_get(step, "cls", list)[-1:])], [_id(_get(step, "sep", list)[-1:])]
    if kind != "TemplateProcessing":
        raise UnsupportedError(f"the post-processor {str(kind)[:80]} is not supported")
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for part in _get(step, "single", list):
        if "Sequence" in _object(part) and _object(part["Sequence"]).get("id") == "A" and side == 0:
            side = 1
        elif "SpecialToken" in part:
            name = _get(_object(part["SpecialToken"]), "id", str)
            token = _get(_get(step, "special_tokens", dict), name, dict)
            sides[side].extend(_id([value]) for value in _get(token, "ids", list))
        else:
            raise UnsupportedError(f"the template {str(step['single'])[:200]} is not supported")
    if side == 0:
        raise UnsupportedError(f"the template {str(step['single'])[:200]} is not supported")
    return sides


def _pattern(step: Step) -> tuple[str, bool]:
    """(expression or text, whether it is a text)"""
    pattern = _get(step, "pattern", dict)
    literal = "String" in pattern
    return _get(pattern, "String" if literal else "Regex", str), literal


def _get(step: Step, name: str, kind: type, default: Any = None) -> Any:
    value = step.get(name, default)
    if type(value) is not kind:
        place = f"{name} is {str(value)[:80]!r} in {str(dict(step))[:200]}"
        raise FormatError(f"{place}; it must be of type {kind.__name__}")
    return value


def _object(value: Any) -> Step:
    if not isinstance(value, dict):
        raise FormatError(f"holds {str(value)[:80]!r}; it must be an object")
    return value


def _id(values: list[Any]) -> int:
    """The only one of `values`."""
    if len(values) != 1 or type(values[0]) is not int or not 0 <= values[0] < 2**31:
        raise FormatError(f"{str(values)[:80]!r} is no token id")
    return values[0]
