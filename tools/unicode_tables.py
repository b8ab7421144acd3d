"""Writes native/text/unicode_data.cpp: what the text code must know of Unicode, as the `tokenizers` library knows it.

That library takes its properties from several Unicode versions at once (a regular-expression engine, Rust's standard
library, old crates). Token ids depend on them, so they are asked of the library itself, character by character; only
grapheme breaks and combining classes, which it does not show as such, come from the `regex` module.

    PYTHONPATH=src python tools/unicode_tables.py > native/text/unicode_data.cpp
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import regex
import sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers

from mnemos.text.sentencepiece import _fields

POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
TEXT = "".join(map(chr, POINTS))
CATEGORIES = [
    *("Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"),
    *("Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"),
]  # as the names in character_set.cpp
FLAGS = (r"\w", r"\s", r"\p{Han}", r"\p{Hiragana}", r"\p{Katakana}", r"\p{Hangul}")  # bits, as in CharacterSet::flag
BREAKS = [
    *("Other", "CR", "LF", "Control", "Extend", "ZWJ", "Regional_Indicator", "Prepend", "SpacingMark"),
    *("L", "V", "T", "LV", "LVT"),
]  # as the enum in graphemes.cpp
PICTOGRAPH, CONSONANT, LINKER, CONJOINED = 0x10, 0x20, 0x40, 0x80  # further bits


def matching(pattern: str) -> set[int]:
    """Code points that the library's regular expressions match."""
    rest = normalizers.Replace(Regex(pattern), "").normalize_str(TEXT)
    return set(POINTS) - set(map(ord, rest))


def cut_out(pre_tokenizer: pre_tokenizers.PreTokenizer) -> set[int]:
    """Code points that become pieces of their own between letters."""
    found = set()
    for begin in range(0, len(POINTS), 1 << 16):
        text = "x" + "x".join(map(chr, POINTS[begin : begin + (1 << 16)])) + "x"
        found |= {ord(piece) for piece, _ in pre_tokenizer.pre_tokenize_str(text) if len(piece) == 1 and piece != "x"}
    return found


def changed_by(normalizer: normalizers.Normalizer, points: Iterable[int] = POINTS) -> dict[int, str]:
    """code point -> what it becomes, if that is something else."""
    results = {c: normalizer.normalize_str(chr(c)) for c in points}
    return {c: result for c, result in results.items() if result != chr(c)}


def word_characters() -> set[int]:
    pieces = pre_tokenizers.Whitespace().pre_tokenize_str(" ".join("a" + chr(c) for c in POINTS))
    return {ord(piece[1]) for piece, _ in pieces if len(piece) == 2 and piece[0] == "a"}


def ranges(value: Callable[[int], int]) -> list[int]:
    """(first code point << 8 | value) of each run of equal values."""
    runs, last = [], None
    for c in range(0x110000):
        now = 0 if 0xD800 <= c < 0xE000 else value(c)
        if now != last:
            runs.append(c << 8 | now)
            last = now
    return runs


def array(kind: str, name: str, values: Sequence[int]) -> None:
    """Prints an array and its size."""
    print(f"const {kind} {name}[] = {{")
    line = "   "
    for value in values:
        item = f" {value:#x}," if value > 9 else f" {value},"
        if len(line) + len(item) > 120:
            print(line)
            line = "   "
        line += item
    print(f"{line}\n}};\nconst size_t {name}_size = {len(values)};\n")


def regex_classes() -> None:
    category = [0] * 0x110000
    for index, name in enumerate(CATEGORIES):
        for c in matching(rf"\p{{{name}}}") if index else ():
            category[c] = index
    flags = [0] * 0x110000
    for bit, pattern in enumerate(FLAGS):
        for c in matching(pattern):
            flags[c] |= 1 << bit
    kinds = sorted({(category[c], flags[c]) for c in POINTS})
    assert len(kinds) <= 64, "a class must be a bit of a 64-bit mask"
    number = {kind: index for index, kind in enumerate(kinds)}
    array("uint8_t", "regex_class_categories", [kind[0] for kind in kinds])
    array("uint8_t", "regex_class_flags", [kind[1] for kind in kinds])
    array("uint32_t", "regex_class_runs", ranges(lambda c: number[category[c], flags[c]]))


def character_flags() -> None:
    cleaned = changed_by(normalizers.BertNormalizer(True, False, False, False))
    unaccented = changed_by(normalizers.BertNormalizer(False, False, True, False))
    sets = [
        word_characters(),
        matching(r"\s"),
        cut_out(pre_tokenizers.Digits(individual_digits=True)),
        cut_out(pre_tokenizers.Punctuation()),
        {c for c, text in cleaned.items() if text == ""},
        {c for c, text in unaccented.items() if text == ""},
        {c for c, text in changed_by(normalizers.StripAccents()).items() if text == ""},
    ]
    array("uint32_t", "character_flag_runs", ranges(lambda c: sum((c in s) << bit for bit, s in enumerate(sets))))
    lower = {c: text for c, text in changed_by(normalizers.Lowercase()).items() if c != 0x130}
    assert all(len(text) == 1 for text in lower.values())
    array("uint32_t", "lower_cases", [value for c, text in sorted(lower.items()) for value in (c, ord(text))])


def normal_forms() -> None:
    decompose, compose = normalizers.NFD(), normalizers.NFC()
    syllables = range(0xAC00, 0xD7A4)
    points = [c for c in POINTS if c not in syllables]
    canonical = changed_by(decompose, points)
    compatible = {c: t for c, t in changed_by(normalizers.NFKD(), points).items() if canonical.get(c) != t}
    for name, table in (("canonical", canonical), ("compatible", compatible)):
        pool: list[int] = []
        entries: list[int] = []
        for c, text in sorted(table.items()):
            entries += [c, len(pool)]
            pool += map(ord, text)
        array("uint32_t", f"{name}_entries", [*entries, 0x110000, len(pool)])
        array("uint32_t", f"{name}_texts", pool)
    pairs = []
    for c, text in canonical.items():
        first = compose.normalize_str(text[:-1])
        if len(text) > 1 and len(first) == 1 and compose.normalize_str(text) == chr(c):
            pairs.append((ord(first), ord(text[-1]), c))
    array("uint32_t", "compositions", [value for pair in sorted(pairs) for value in pair])
    classes = [0] * 0x110000
    for number in sorted({unicodedata.combining(chr(c)) for c in POINTS} - {0}):
        for found in regex.finditer(rf"\p{{ccc={number}}}", TEXT):
            c, low = found[0], "\u0334"
            tested = "\u0345" + c if number == 1 else c + low
            if number == 1 or c == low or decompose.normalize_str(tested) != tested:
                classes[ord(c)] = number  # others are too new for the library
    array("uint32_t", "combining_class_runs", ranges(lambda c: classes[c]))


@cache
def extending() -> dict[int, bool]:
    """Whether a character is of one cluster with an A before it: a table that maps A to a then takes it away.

    Those that the table takes away in any case are left out.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"]), model_writer=model, vocab_size=6, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="nfkc_cf",
    )  # fmt: skip
    found = dict(_fields(dict(_fields(model.getvalue(), "model"))[3], "normalizer_spec"))
    mapped = normalizers.Precompiled(found[2])
    return {c: mapped.normalize_str("A" + chr(c)) == "a" for c in POINTS if mapped.normalize_str(chr(c))}


def grapheme_breaks() -> None:
    kinds = [0] * 0x110000
    for index, name in enumerate(BREAKS):
        for found in regex.finditer(rf"\p{{GCB={name}}}", TEXT) if index else ():
            kinds[ord(found[0])] = index
    for c in POINTS:  # which characters go on with a cluster, the library does show
        extends = extending().get(c)
        if extends is not None and extends != (BREAKS[kinds[c]] in ("Extend", "ZWJ", "SpacingMark")):
            kinds[c] = BREAKS.index("Extend" if extends else "Other")
    further = [(PICTOGRAPH, r"\p{Extended_Pictographic}"), (CONSONANT, r"\p{InCB=Consonant}")]
    further += [(LINKER, r"\p{InCB=Linker}"), (CONJOINED, r"\p{InCB=Extend}")]
    for bit, pattern in further:
        for found in regex.finditer(pattern, TEXT):
            kinds[ord(found[0])] |= bit
    array("uint32_t", "grapheme_break_runs", ranges(lambda c: kinds[c]))


def main() -> None:
    print("// Written by tools/unicode_tables.py, which says where the values are from. unicode.h says what they mean.")
    print('// clang-format off\n#include "text/unicode_data.h"\n\nnamespace mnemos {\n')
    regex_classes()
    character_flags()
    normal_forms()
    grapheme_breaks()
    print("}  // namespace mnemos")


if __name__ == "__main__":
    main()
