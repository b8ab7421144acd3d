"""Tokenizers from GGUF metadata: byte-pair merges (`gpt2`, `gemma4`) and SentencePiece's two kinds.

SentencePiece either merges neighbours by score (`llama`) or finds a text's most probable pieces (`t5`, unigram).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mnemos.errors import FormatError, UnsupportedError
from mnemos.text.core import ByteLevelSpelling, SentencePieceSpelling, TokenizerCore
from mnemos.text.encoder import AddedToken, Encoder, Pipeline, Step, compile_encoder
from mnemos.text.gguf_models import MergedModel, Model, ScoredModel, UnigramModel
from mnemos.text.library import require_tokenizers, wrap_model
from mnemos.text.pretokenizers import PreTokenizer, find_pre_tokenizer
from mnemos.text.vocabulary import PREFIX, TokenType, Vocabulary, mark_special_tokens, read_vocabulary

MODELS = ("gpt2", "llama", "gemma4", "t5")
_SPACE = "\u2581"


def names_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file says that it holds a tokenizer, be it one that cannot be built."""
    name = metadata.get(PREFIX + "model")  # any kind of value may stand there, such as an array
    return name is not None and not (isinstance(name, str) and name == "none")


def model_name(metadata: Mapping[str, Any], label: str) -> str:
    """`tokenizer.ggml.model`, if it is one that can be built."""
    name = metadata.get(PREFIX + "model")
    if not names_tokenizer(metadata):
        found = "is missing" if name is None else "is 'none'"
        raise FormatError(f"{label}: {PREFIX}model {found}; the file holds no tokenizer")
    if not isinstance(name, str) or name not in MODELS:
        raise UnsupportedError(f"{label}: {PREFIX}model is {str(name)[:80]!r}; supported are {', '.join(MODELS)}")
    return name


@dataclass(frozen=True)
class Description:
    """A tokenizer as the metadata describes it, before anything is compiled.

    vocabulary  with the types corrected (`mark_special_tokens`)
    pipeline    what surrounds the model; special tokens around a text are the fields `prefix_ids` and `suffix_ids`
    adds_space  encoding puts a space before a text, which decoding takes away
    """

    vocabulary: Vocabulary
    model: Model
    spelling: ByteLevelSpelling | SentencePieceSpelling
    pipeline: Pipeline
    adds_space: bool
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eos_ids: frozenset[int]

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch's shorter rows."""
        return self.vocabulary.special_id("padding_token_id")


def describe(metadata: Mapping[str, Any], label: str) -> Description:
    """The tokenizer in a GGUF file's metadata; `label` is the file, for errors (FormatError, UnsupportedError)."""
    name = model_name(metadata, label)
    if name == "llama":
        return _sentencepiece(read_vocabulary(metadata, label))
    if name == "t5":
        return _unigram(read_vocabulary(metadata, label))
    return _bpe(read_vocabulary(metadata, label), _pre_tokenizer(metadata, label))


def build_core(metadata: Mapping[str, Any], label: str) -> TokenizerCore:
    """The tokenizer that a GGUF file's metadata describes, ready for work. Errors: as `describe`."""
    found = describe(metadata, label)
    vocabulary = found.vocabulary
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    return TokenizerCore(
        label=label,
        texts=vocabulary.texts,
        spelling=found.spelling,
        literal_ids=frozenset((*special, *vocabulary.of_type(TokenType.USER_DEFINED))),
        silent_ids=frozenset(vocabulary.of_type(TokenType.UNUSED, TokenType.UNDEFINED)),
        special_ids=frozenset(special),
        strips_space=found.adds_space,
        encoder=_encoder(found.model, found.pipeline),
        find=vocabulary.ids.get,
        prefix_ids=found.prefix_ids,
        suffix_ids=found.suffix_ids,
        bos_id=found.bos_id,
        eos_id=found.eos_id,
        pad_id=found.pad_id,
        unknown_id=found.unknown_id,
        eos_ids=found.eos_ids,
    )


def _pre_tokenizer(metadata: Mapping[str, Any], label: str) -> PreTokenizer:
    pre = metadata.get(PREFIX + "pre", "default") if model_name(metadata, label) == "gpt2" else "gemma4"
    if not isinstance(pre, str):
        raise FormatError(f"{label}: {PREFIX}pre is {str(pre)[:80]!r}; it must be the name of a pre-tokenizer")
    return find_pre_tokenizer(pre, label)


def _bpe(vocabulary: Vocabulary, pre: PreTokenizer) -> Description:
    steps: list[Step] = [_split(pattern) for pattern in pre.patterns]
    if pre.byte_level:
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    model = MergedModel(vocabulary, ignore_merges=pre.ignore_merges, byte_fallback=not pre.byte_level)
    return _finish(
        vocabulary,
        model,
        ByteLevelSpelling() if pre.byte_level else SentencePieceSpelling(),
        normalizer=None if pre.byte_level else _replace({"String": " "}, _SPACE),
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        add_bos=pre.add_bos,
    )


def _split(pattern: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(pattern: Step, content: str) -> Step:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sentencepiece(vocabulary: Vocabulary) -> Description:
    if vocabulary.scores is None:
        raise FormatError(f"{vocabulary.label}: {PREFIX}scores is missing; the tokenizer 'llama' merges by score")
    unknown = vocabulary.special_id("unknown_token_id", 0)
    return _finish(
        vocabulary,
        ScoredModel(vocabulary, unknown),
        SentencePieceSpelling(),
        normalizer=_normalizer(vocabulary),
        add_bos=True,
        adds_space=vocabulary.flag("add_space_prefix", True),
        default_bos=1,
        default_eos=2,
        default_unknown=0,
    )


def _unigram(vocabulary: Vocabulary) -> Description:
    if vocabulary.scores is None:
        raise FormatError(f"{vocabulary.label}: {PREFIX}scores is missing; the tokenizer 't5' needs probabilities")
    has_bytes = bool(vocabulary.of_type(TokenType.BYTE))
    return _finish(
        vocabulary,
        UnigramModel(vocabulary, vocabulary.special_id("unknown_token_id", 0), has_bytes),
        SentencePieceSpelling(has_bytes),
        normalizer=_normalizer(vocabulary),
        adds_space=vocabulary.flag("add_space_prefix", True),
        default_unknown=0,
    )


def _normalizer(vocabulary: Vocabulary) -> Step:
    """What SentencePiece does to a text before it is cut: its table of characters, then spaces."""
    steps: list[Step] = []
    table = vocabulary.metadata.get(PREFIX + "precompiled_charsmap")
    if table is not None and len(table):
        from base64 import b64encode

        encoded = b64encode(bytes(bytearray(table))).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if vocabulary.flag("remove_extra_whitespaces", False):
        steps += [_replace({"Regex": r"\A +|[ \u2581]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if vocabulary.flag("add_space_prefix", True):
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, _SPACE)]}


def _finish(
    vocabulary: Vocabulary,
    model: Model,
    spelling: ByteLevelSpelling | SentencePieceSpelling,
    *,
    normalizer: Step | None = None,
    pre_tokenizer: Step | None = None,
    add_bos: bool = False,
    adds_space: bool = False,
    default_bos: int | None = None,
    default_eos: int | None = None,
    default_unknown: int | None = None,
) -> Description:
    """The parts that both kinds have in common: special tokens and what surrounds a text."""
    bos = vocabulary.special_id("bos_token_id", default_bos)
    eos = vocabulary.special_id("eos_token_id", default_eos)
    unknown = vocabulary.special_id("unknown_token_id", default_unknown)
    types, ends = mark_special_tokens(vocabulary, eos)
    marked = replace(vocabulary, types=types)
    special = marked.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    added = marked.of_type(TokenType.USER_DEFINED)
    found = [_written(token, False, marked) for token in added] + [_written(token, True, marked) for token in special]
    return Description(
        vocabulary=marked,
        model=model,
        spelling=spelling,
        pipeline=Pipeline(normalizer, pre_tokenizer, added=found),
        adds_space=adds_space,
        prefix_ids=_surrounding(marked, "add_bos_token", add_bos, "bos_token_id", bos),
        suffix_ids=_surrounding(marked, "add_eos_token", False, "eos_token_id", eos),
        bos_id=bos,
        eos_id=eos,
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


def _written(token: int, special: bool, vocabulary: Vocabulary) -> AddedToken:
    """A token as it is found in raw text. Phi-3's swallow the spaces after them, which no key of the file says."""
    name, text = str(vocabulary.metadata.get("general.name", "")).lower(), vocabulary.texts[token]
    strips = ("phi-3" in name or "phi3" in name) and text not in ("<unk>", "<s>", "<|endoftext|>")
    return AddedToken(text, token, special, rstrip=strips)


def _encoder(model: Model, pipeline: Pipeline) -> Encoder:
    """The native core's encoder, or the library's where there is no core."""
    vocabulary = model.vocabulary
    if vocabulary.pieces is not None:
        return compile_encoder(model.compiled(vocabulary.pieces), pipeline)
    require_tokenizers(vocabulary.label, "without the native core, its tokenizer needs a library")
    return wrap_model(model.of_library(), pipeline)


def named_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """GGUF keeps further templates under tokenizer.chat_template.NAME."""
    prefix = "tokenizer.chat_template."
    return {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }
