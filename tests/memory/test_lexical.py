"""Texts ranked by their words."""

from __future__ import annotations

from math import log

import pytest

from mnemos.memory.lexical import LexicalIndex


@pytest.fixture
def index() -> LexicalIndex:
    made = LexicalIndex()
    made.add("moon", "The moon circles the earth in 27 days.")
    made.add("sun", "The sun is a star; the earth circles it.")
    made.add("bread", "Flour, water and salt make bread.")
    return made


def test_rare_words_count_more(index: LexicalIndex) -> None:
    assert [name for name, _ in index.rank("How long does the MOON take?", 3)] == ["moon", "sun"]
    assert [name for name, _ in index.rank("earth and star", 3)] == ["sun", "bread", "moon"]
    assert index.rank("quantum", 3) == []


def test_the_formula() -> None:
    index = LexicalIndex()
    index.add("a", "x x y")
    index.add("b", "y")
    ((name, score),) = index.rank("x", 5)
    length = 1 - 0.75 + 0.75 * 3 / 2
    assert (name, score) == ("a", pytest.approx(log(1 + 1.5 / 1.5) * 2 * 2.2 / (2 + 1.2 * length)))


def test_texts_are_replaced_and_forgotten(index: LexicalIndex) -> None:
    index.add("moon", "Cheese.")
    assert [name for name, _ in index.rank("cheese moon", 3)] == ["moon"]
    index.remove("moon")
    index.remove("moon")
    assert index.rank("cheese moon", 3) == []
    assert (len(index), "sun" in index, "moon" in index) == (2, True, False)
