"""Prompts for the text between two others."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemos.text.infill import infill_ids
from mnemos.text.tokenizer import Tokenizer

FAMILIES = [
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
]


def made(folder: Path, names: tuple[str, ...]) -> Tokenizer:
    """A tokenizer of single characters with some special tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_texts_stand_between_the_models_marks(family: tuple[str, str, str], tmp_path: Path) -> None:
    tokenizer = made(tmp_path, family)
    ids = infill_ids(tokenizer, "a = ", f" + {family[2]}")
    assert ids is not None
    shown = tokenizer.decode(ids, skip_special=False)
    assert shown == f"{family[0]}a = {family[1]} + {family[2]}{family[2]}"
    assert sum(token in tokenizer.special_ids for token in ids) == 3  # a mark's name in a text is text


def test_a_model_without_such_marks_cannot(tmp_path: Path) -> None:
    assert infill_ids(made(tmp_path, ("<|end|>",)), "a", "b") is None
