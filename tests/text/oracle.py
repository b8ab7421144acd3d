"""Tokenizers in the native core beside the same ones in the `tokenizers` library, and texts to compare them on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from mnemos.text import gguf, vocabulary
from mnemos.text.core import TokenizerCore
from mnemos.text.huggingface import Settings, build_core
from mnemos.text.library import LibraryEncoder
from mnemos.text.sentencepiece import read_metadata

Encode = Callable[[str, bool, bool], list[int]]  # text, add_special, parse_special

# What splits, merges, normalizers and special tokens depend on, in orders that no text has.
PIECES = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\v", "\x85", "\u2028", "\u3000", "\u00a0", "\u200b", "\0",
    "the", " the", "The", "THE", "hello", "hell", "o", "ing", "don't", "I'LL", "'s", "'S", "'\u017f", "'re", "'VE",
    "x", "Zq", "aB", "ABc", "\u212a", "\u0130", "\u0131", "\u00df", "\u1e9e", "\ufb01", "\ufb06", "\u01c5",
    "\u03a3\u03c2", "1", "12", "123", "1234567", "\u0663", "\u00b2", "\u00bd", "\u2167", "\U0001d7d8", "\u0be7",
    "3.14", "1,000", ".", "...", ",", "!", "?!", "--", "_", "__", "$", "+", "<", ">", "=", "^", "~", "`", "|", "#",
    "@", "\\", "/", "()", "\u2026", "\u00bf", "\u201c", "\u2019", "\u300c", "\u3002", "\uff01", "\u00ab", "\u20ac",
    "\u2192", "\u00d7", "\u00a9", "\u00e9", "e\u0301", "\u0301", "\u00fc", "u\u0308\u0304", "\u1ea5", "a\u0323\u0302",
    "\u0345", "\u0334", "\u05b0", "\u0440\u0443\u0441", "\u03b1\u03b2", "\u05d0\u05b4", "\u0639\u064e\u0631",
    "\u0e01\u0e34\u0e33", "\u0915\u094d\u0937\u093f", "\u4f60\u597d", "\u3042\u30ab\u30fc", "\u30ab\u3099", "\uac00",
    "\u1100\u1161\u11a8", "\uac00\u11a8", "\uff76\uff9e", "\uf900", "\U00020000", "\U0001f600",
    "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd", "\ufffd", "\ue000",
    "\u0378", "\ufeff", "\u00ad", "\u202e", "\u061c", "\U000e0041", "\u2581", "\u2581\u2581", "\u2581the",
    "<|endoftext|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<fim_prefix>", "</s>", "<s>", "<unk>", "<0x0A>",
    "[MASK]", "[CLS]", "word", "raw", "wide", "\n<wide>\t", "<think>", "<|user|>", "<|end|>", "<sentinel:3>",
    "IMGIMGABCZ",
)  # fmt: skip
SCRIPTS = ((0x20, 0x7F), (0xA0, 0x250), (0x250, 0x600), (0x600, 0x900), (0x900, 0x1100), (0x1100, 0x2000),
           (0x2000, 0x3400), (0x3400, 0xA000), (0xA000, 0xD800), (0xF900, 0x10000), (0x10000, 0x20000),
           (0x1F000, 0x20000), (0x20000, 0x110000))  # fmt: skip


def random_text(chance: random.Random) -> str:
    """A short text: pieces, characters of a few scripts, or both."""
    parts: list[str] = []
    for _ in range(chance.randrange(1, 10)):
        if chance.random() < 0.7:
            parts.append(chance.choice(PIECES) * (1 if chance.random() < 0.9 else chance.randrange(1, 70)))
        else:
            low, high = chance.choice(SCRIPTS)
            parts.extend(chr(chance.randrange(low, high)) for _ in range(chance.randrange(1, 8)))
    return "".join(part for part in "".join(parts) if not 0xD800 <= ord(part) < 0xE000)


@dataclass(frozen=True)
class Pair:
    """One tokenizer twice."""

    name: str
    native: Encode
    library: Encode

    def difference(self, text: str) -> str:
        """What is different about the ids of `text`; "" if nothing is."""
        for add_special, parse_special in ((True, True), (False, False)):
            expected = self._result(self.library, text, add_special, parse_special)
            ids = self._result(self.native, text, add_special, parse_special)
            if ids != expected:
                return f"{self.name}: {text!r}, parse_special={parse_special}: {ids} instead of {expected}"
        return ""

    @staticmethod
    def _result(encode: Encode, *arguments: Any) -> list[int] | str:
        try:
            return encode(*arguments)
        except Exception:
            return "an error"


@contextmanager
def without_core() -> Iterator[None]:
    """GGUF's tokenizers are built by the library."""
    core = vocabulary.core
    vocabulary.core = None
    try:
        yield
    finally:
        vocabulary.core = core


def library_core(metadata: dict[str, Any], label: str) -> TokenizerCore:
    with without_core():
        core = gguf.build_core(metadata, label)
    assert isinstance(core.encoder, LibraryEncoder)
    return core


def gguf_pair(name: str, metadata: dict[str, Any]) -> Pair:
    native = gguf.build_core(metadata, name)
    assert not isinstance(native.encoder, LibraryEncoder)
    return Pair(name, native.encode, library_core(metadata, name).encode)


def file_pair(name: str, tokenizer: tokenizers.Tokenizer, folder: Path) -> Pair:
    """A tokenizer.json written by the library, read by both."""
    file = folder / f"{name}.json"
    tokenizer.save(str(file))
    native = build_core(file, Settings())
    assert not isinstance(native.encoder, LibraryEncoder), name
    whole, plain = (tokenizers.Tokenizer.from_file(str(file)) for _ in range(2))
    plain.encode_special_tokens = True

    def library(text: str, add_special: bool, parse_special: bool) -> list[int]:
        ids: list[int] = (whole if parse_special else plain).encode(text, add_special_tokens=add_special).ids
        return ids

    return Pair(name, native.encode, library)


def _added(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """With added tokens of every kind."""
    plain = [("<|endoftext|>", {}), ("[MASK]", {"lstrip": True}), ("[CLS]", {}), ("<|end|>", {"rstrip": True})]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, **flags) for text, flags in plain])
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken("word", single_word=True, normalized=False),
            tokenizers.AddedToken("raw", normalized=False),
            tokenizers.AddedToken("The", normalized=True),
            tokenizers.AddedToken("<wide>", lstrip=True, rstrip=True, normalized=False),
            tokenizers.AddedToken("\u00e9", normalized=True),
            tokenizers.AddedToken("   ", normalized=False),
        ]
    )
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A <|end|>", None, [("[CLS]", first), ("<|end|>", last)]
    )
    return tokenizer


def sentencepiece_metadata(folder: Path, kind: str, texts: list[str]) -> dict[str, Any]:
    """A small SentencePiece model with its table of characters, as GGUF metadata."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / kind), model_type=kind, vocab_size=2400,
        character_coverage=0.98, normalization_rule_name="nmt_nfkc_cf", byte_fallback=kind == "bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return read_metadata(folder / f"{kind}.model")


def make_models(texts: list[str]) -> dict[str, tokenizers.Tokenizer]:
    """A tokenizer of each kind of model, trained on `texts`."""
    from tokenizers import trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made: dict[str, tokenizers.Tokenizer] = {}

    def train(name: str, model: Any, trainer: Any, **parts: Any) -> None:
        tokenizer = made[name] = tokenizers.Tokenizer(model)
        for part, value in parts.items():
            setattr(tokenizer, part, value)
        tokenizer.train_from_iterator(texts, trainer)

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = {"vocab_size": 1500, "show_progress": False}
    train("bytes", models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **bpe), pre_tokenizer=byte_level)
    train(
        "suffixes",
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(special_tokens=["<unk>"], end_of_word_suffix="</w>", **bpe),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )
    train(
        "marks",
        models.BPE(unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(special_tokens=["<unk>"], limit_alphabet=200, **bpe),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    )
    train(
        "prefixes",
        models.BPE(continuing_subword_prefix="##"),
        trainers.BpeTrainer(continuing_subword_prefix="##", **bpe),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )
    words = [piece for text in texts for piece, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(text)]
    pieces = sorted({word[i : i + size] for word in words for size in range(1, 6) for i in range(0, len(word), 3)})
    scores = {"<unk>": 0.0, "\u2581": -2.0} | {piece: -1.0 - len(piece) - i / 977 for i, piece in enumerate(pieces)}
    unigram = list(scores.items())
    tokenizer = made["unigram"] = tokenizers.Tokenizer(models.Unigram(unigram, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = made["unigram-bytes"] = tokenizers.Tokenizer(
        models.Unigram([*unigram, *bytes_], unk_id=0, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")])
    words = list(dict.fromkeys(["[UNK]", *pieces[:3000], *(f"##{piece}" for piece in pieces[:3000])]))
    tokenizer = made["wordpiece"] = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]", max_input_chars_per_word=20)
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def variants(made: dict[str, tokenizers.Tokenizer]) -> Iterator[tuple[str, tokenizers.Tokenizer]]:
    """The trained tokenizers, and their models with every normalizer and pre-tokenizer."""

    def with_parts(name: str, normalizer: Any = None, pre_tokenizer: Any = None) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(made[name].to_str())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        return tokenizer

    for name, tokenizer in made.items():
        yield name, tokenizer
        yield f"{name}-added", _added(with_parts(name))
    n = normalizers
    for i, normalizer in enumerate(
        [n.NFC(), n.NFD(), n.NFKC(), n.NFKD(), n.Lowercase(), n.StripAccents(), n.Strip(), n.Strip(True, False),
         n.Sequence([n.NFKD(), n.StripAccents(), n.Lowercase()]), n.Prepend("\u2581"), n.Replace("l", "<"),
         n.Replace(tokenizers.Regex(r"\s+"), " "), n.BertNormalizer(lowercase=False),
         n.BertNormalizer(strip_accents=False), n.BertNormalizer(clean_text=False), n.ByteLevel(),
         n.BertNormalizer(handle_chinese_chars=False)]
    ):  # fmt: skip
        yield f"normalizer-{i}", _added(with_parts("bytes", normalizer))
    p = pre_tokenizers
    uses = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")
    patterns = (tokenizers.Regex(r"\p{L}+|\d"), "l", "the")
    splits = [p.Split(pattern, use, inverted) for pattern in patterns for use in uses for inverted in (False, True)]
    last = p.ByteLevel(add_prefix_space=False, use_regex=False)
    for i, cut in enumerate(
        [p.Digits(True), p.Digits(False), p.Punctuation(), p.Whitespace(), p.WhitespaceSplit(), p.BertPreTokenizer(),
         p.CharDelimiterSplit("e"), p.Metaspace(prepend_scheme="first"), p.Metaspace(prepend_scheme="never"),
         p.Metaspace(split=False), p.Metaspace("_"), p.ByteLevel(add_prefix_space=True), *splits,
         *(p.Punctuation(use) for use in uses)]
    ):  # fmt: skip
        yield f"cut-{i}", _added(with_parts("bytes", None, p.Sequence([cut, last])))
        yield f"cut-marks-{i}", _added(with_parts("marks", None, p.Sequence([cut, p.Metaspace()])))
    for i, normalizer in enumerate((None, n.NFC(), n.Replace(" ", "_"), n.Prepend("a"))):
        first = with_parts("marks", normalizer, p.Metaspace(prepend_scheme="first"))
        first.add_tokens([tokenizers.AddedToken("raw", normalized=False, lstrip=True)])
        yield f"first-{i}", first
