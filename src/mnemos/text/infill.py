"""Prompts that ask for the text between a beginning and an end, for models that were trained to fill in."""

from __future__ import annotations

from mnemos.text.tokenizer import Tokenizer

# The tokens before the beginning, before the end, and before what is to be written, by family.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


def infill_ids(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int] | None:
    """The prompt for what comes between two texts; None if the vocabulary has no tokens for it.

    The order is prefix, suffix, middle (Bavarian et al., 2022, arXiv:2207.14255). Names of special tokens in the
    texts are text.
    """
    for family in _FAMILIES:
        marks = [tokenizer.encode(name, False, True) for name in family]
        if all(len(ids) == 1 and ids[0] in tokenizer.special_ids for ids in marks):
            before, after = (tokenizer.encode(text, False, False, continues=True) for text in (prefix, suffix))
            bos = tokenizer.bos_id
            begin = [] if bos is None or tokenizer.encode("a")[:1] != [bos] else [bos]
            return [*begin, *marks[0], *before, *marks[1], *after, *marks[2]]
    return None
