"""Tokenizers from GGUF metadata: byte-pair merges (`gpt2`, `gemma4`) and SentencePiece's two kinds.

SentencePiece either merges neighbours by score (`llama`) or finds a text's most probable pieces (`t5`, unigram).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.string_array import StringArray
from mnemos.native import core
from mnemos.text.core import (
    ByteLevelSpelling,
    SentencePieceSpelling,
    Spelling,
    TokenizerCore,
    byte_characters,
    library_errors,
    share_model,
)
from mnemos.text.pretokenizers import PreTokenizer, find_pre_tokenizer
from mnemos.text.vocabulary import PREFIX, TokenType, Vocabulary, mark_special_tokens, read_strings, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import AddedToken

MODELS = ("gpt2", "llama", "gemma4", "t5")
_HIDDEN = "\ufdd3"  # part of no text: pieces with it are never found
_SPACE = "\u2581"
_BYTE_NAMES = "".join(f"<0x{byte:02X}>" for byte in range(256))


def model_name(metadata: Mapping[str, Any], label: str) -> str:
    """`tokenizer.ggml.model`, if it is one that can be built."""
    name = metadata.get(PREFIX + "model")
    if name is None:
        raise FormatError(f"{label}: {PREFIX}model is missing; the file holds no tokenizer")
    if not isinstance(name, str) or name not in MODELS:
        raise UnsupportedError(f"{label}: {PREFIX}model is {str(name)[:80]!r}; supported are {', '.join(MODELS)}")
    return name


def build_core(metadata: Mapping[str, Any], label: str) -> TokenizerCore:
    """The tokenizer that a GGUF file's metadata describes; `label` is the file, for errors."""
    name = model_name(metadata, label)
    if name == "llama":
        return _sentencepiece_core(read_vocabulary(metadata, label))
    if name == "t5":
        return _unigram_core(read_vocabulary(metadata, label))
    return _bpe_core(read_vocabulary(metadata, label), _pre_tokenizer(metadata, label))


def can_build_for_text(metadata: Mapping[str, Any]) -> bool:
    """Whether `build_core_for` knows the kind: byte-pair merges, as they are stored in a file."""
    arrays = (metadata.get(PREFIX + "tokens"), metadata.get(PREFIX + "merges"))
    if metadata.get(PREFIX + "model") in ("llama", "t5") or not all(isinstance(array, StringArray) for array in arrays):
        return False
    return core is not None  # the reference runs without it


def build_core_for(text: str, metadata: Mapping[str, Any], label: str) -> TokenizerCore:
    """Like `build_core`, but the tokenizer need only encode `text`, for which few tokens and merges matter.

    A merge of pieces of the text gives a piece of the text. So whatever byte-pair encoding looks up occurs in the text
    as tokens spell it, and special tokens in the text itself; everything else can be left out, and the ids are those of
    the whole tokenizer. `text` must be without surrogates.
    """
    pre = _pre_tokenizer(metadata, label)
    if pre.byte_level:
        spelled = text.encode().decode("latin-1").translate("".join(byte_characters()))
    else:
        spelled = text.replace(" ", _SPACE) + _BYTE_NAMES
    vocabulary = read_vocabulary(metadata, label, within=f"{text}\0{spelled}")
    return replace(_bpe_core(vocabulary, pre), whole=vocabulary.within is None)


def _pre_tokenizer(metadata: Mapping[str, Any], label: str) -> PreTokenizer:
    pre = metadata.get(PREFIX + "pre", "default") if model_name(metadata, label) == "gpt2" else "gemma4"
    if not isinstance(pre, str):
        raise FormatError(f"{label}: {PREFIX}pre is {str(pre)[:80]!r}; it must be the name of a pre-tokenizer")
    return find_pre_tokenizer(pre, label)


def _bpe_core(vocabulary: Vocabulary, pre: PreTokenizer) -> TokenizerCore:
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    if vocabulary.within is None:
        written: Sequence[str] = read_strings(vocabulary.metadata, "merges", vocabulary.label)
    else:
        array: StringArray = vocabulary.metadata[PREFIX + "merges"]
        written = list(array.occurring_in(vocabulary.within, halves=True).values())
    merges = split_merges(written, vocabulary.label)
    with library_errors(f"{vocabulary.label}: {PREFIX}merges do not fit {PREFIX}tokens"):
        model = models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges, byte_fallback=not pre.byte_level)
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    if pre.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return _finish(
        vocabulary,
        model,
        ByteLevelSpelling() if pre.byte_level else SentencePieceSpelling(),
        normalizer=None if pre.byte_level else normalizers.Replace(" ", _SPACE),
        pre_tokenizer=pre_tokenizers.Sequence(steps),
        add_bos=pre.add_bos,
    )


def split_merges(merges: Sequence[str], label: str) -> list[tuple[str, str]]:
    """The two halves of each merge, which a space divides."""
    halves: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    if set(map(len, halves)) == {2}:  # all but exotic files; the careful way takes three times longer
        return halves
    pairs = []
    for index, merge in enumerate(merges):
        divider = merge.find(" ", 1)  # the first half is never empty, but may be a space
        if divider < 0 or divider + 1 == len(merge):
            problem = f"holds {merge[:80]!r} at {index}; a merge is two tokens with a space between"
            raise FormatError(f"{label}: {PREFIX}merges {problem}")
        pairs.append((merge[:divider], merge[divider + 1 :]))
    return pairs


def _sentencepiece_core(vocabulary: Vocabulary) -> TokenizerCore:
    from tokenizers import models

    if vocabulary.scores is None:
        raise FormatError(f"{vocabulary.label}: {PREFIX}scores is missing; the tokenizer 'llama' merges by score")
    unknown = vocabulary.special_id("unknown_token_id", 0)
    model = models.BPE(
        vocabulary.ids,
        merges_by_score(vocabulary),
        unk_token=None if unknown is None else vocabulary.texts[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    return _finish(
        vocabulary,
        model,
        SentencePieceSpelling(),
        normalizer=_normalizer(vocabulary),
        add_bos=True,
        adds_space=vocabulary.flag("add_space_prefix", True),
        default_bos=1,
        default_eos=2,
        default_unknown=0,
    )


def _unigram_core(vocabulary: Vocabulary) -> TokenizerCore:
    """Kudo 2018, arXiv:1804.10959: of all ways to cut a text into pieces, the most probable one."""
    from tokenizers import models

    if vocabulary.scores is None:
        raise FormatError(f"{vocabulary.label}: {PREFIX}scores is missing; the tokenizer 't5' needs probabilities")
    written = set(vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.BYTE))
    texts = [text if i in written else text + _HIDDEN for i, text in enumerate(vocabulary.texts)]
    unknown = vocabulary.special_id("unknown_token_id", 0)
    has_bytes = bool(vocabulary.of_type(TokenType.BYTE))
    with library_errors(f"{vocabulary.label}: the vocabulary cannot be used"):
        pieces = list(zip(texts, vocabulary.scores.tolist(), strict=True))
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=has_bytes)
    core = _finish(
        vocabulary,
        model,
        SentencePieceSpelling(has_bytes),
        normalizer=_normalizer(vocabulary),
        adds_space=vocabulary.flag("add_space_prefix", True),
        default_unknown=0,
    )
    # The library does not find these pieces in its model either, and gives them ids after all others.
    known = {core.encoder.token_to_id(vocabulary.texts[token]): token for token in core.literal_ids}
    return replace(core, moved_ids={moved: token for moved, token in known.items() if moved not in (None, token)})


def _normalizer(vocabulary: Vocabulary) -> Any:
    """What SentencePiece does to a text before it is cut: its table of characters, then spaces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    table = vocabulary.metadata.get(PREFIX + "precompiled_charsmap")
    if table is not None and len(table):
        with library_errors(f"{vocabulary.label}: {PREFIX}precompiled_charsmap is damaged"):
            steps.append(normalizers.Precompiled(bytes(bytearray(table))))
    if vocabulary.flag("remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.flag("add_space_prefix", True):
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens whose concatenation is a token, that with the best score first.

    SentencePiece merges any two neighbours that form a token. Only ordinary tokens take part: plain text never
    becomes a special token.
    """
    assert vocabulary.scores is not None
    texts, ids = vocabulary.texts, vocabulary.ids
    candidates = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED)
    mergeable = {texts[token] for token in candidates}
    order = np.argsort(-vocabulary.scores[candidates], kind="stable")
    merges = []
    for token in np.asarray(candidates)[order].tolist():
        text = texts[token]
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in halves if pair[0] in mergeable and pair[1] in mergeable]
        # The pair whose left half is the better token usually stands first in a text, too.
        merges.extend(pairs if len(pairs) < 2 else sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])))
    return merges


def _finish(
    vocabulary: Vocabulary,
    model: Any,
    spelling: Spelling,
    *,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    add_bos: bool = False,
    adds_space: bool = False,
    default_bos: int | None = None,
    default_eos: int | None = None,
    default_unknown: int | None = None,
) -> TokenizerCore:
    """The parts that both kinds have in common: special tokens and what surrounds a text."""
    bos = vocabulary.special_id("bos_token_id", default_bos)
    eos = vocabulary.special_id("eos_token_id", default_eos)
    unknown = vocabulary.special_id("unknown_token_id", default_unknown)
    types, ends = mark_special_tokens(vocabulary, eos)
    marked = replace(vocabulary, types=types)
    special = marked.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    added = marked.of_type(TokenType.USER_DEFINED)
    texts = vocabulary.texts
    known = None if vocabulary.within is None else set(vocabulary.ids.values())
    written, named = (
        [texts[token] for token in tokens if known is None or token in known] for tokens in (added, special)
    )
    plain = [_written(text, False, marked) for text in written]
    all_written = plain + [_written(text, True, marked) for text in named]
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return TokenizerCore(
        label=vocabulary.label,
        texts=texts,
        spelling=spelling,
        literal_ids=frozenset((*special, *added)),
        silent_ids=frozenset(marked.of_type(TokenType.UNUSED, TokenType.UNDEFINED)),
        special_ids=frozenset(special),
        strips_space=adds_space,
        encoder=share_model(model, all_written, **parts),
        plain_encoder=share_model(model, plain, **parts),
        prefix_ids=_surrounding(marked, "add_bos_token", add_bos, "bos_token_id", bos),
        suffix_ids=_surrounding(marked, "add_eos_token", False, "eos_token_id", eos),
        bos_id=bos,
        eos_id=eos,
        pad_id=vocabulary.special_id("padding_token_id"),
        unknown_id=unknown,
        eos_ids=ends,
    )


def _surrounding(vocabulary: Vocabulary, flag: str, default: bool, key: str, token: int | None) -> tuple[int, ...]:
    if not vocabulary.flag(flag, default):
        return ()
    if token is None and (PREFIX + flag not in vocabulary.metadata or PREFIX + key in vocabulary.metadata):
        return ()  # only the pre-tokenizer's custom asks for it, or the file says that there is no such token
    if token is None:
        raise FormatError(f"{vocabulary.label}: {PREFIX}{flag} is true, but {PREFIX}{key} is missing")
    return (token,)


def _written(text: str, special: bool, vocabulary: Vocabulary) -> AddedToken:
    """A token as it is found in raw text. Phi-3's swallow the spaces after them, which no key of the file says."""
    from tokenizers import AddedToken

    name = str(vocabulary.metadata.get("general.name", "")).lower()
    strips = ("phi-3" in name or "phi3" in name) and text not in ("<unk>", "<s>", "<|endoftext|>")
    return AddedToken(text, special=special, normalized=False, rstrip=strips)


def named_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """GGUF keeps further templates under tokenizer.chat_template.NAME."""
    prefix = "tokenizer.chat_template."
    return {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }
