"""What is found again by its words: texts and sessions, ranked, offered and preloaded, never taken as an answer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, FormatError, RequestError
from tests.engine.toys import LetterTokenizer, ToyModel

TEXTS = {
    "boats": "The harbour has forty boats, of which nine are red.",
    "bees": "Bees dance to tell each other where flowers are.",
    "bread": "Bread rises because yeast makes bubbles of gas.",
}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), LetterTokenizer(), cache_tokens=4000, session_dir=tmp_path) as made:
        yield made


def fill(engine: InferenceEngine) -> None:
    for name, text in TEXTS.items():
        assert engine.memory.add(text, name) == name


def names(engine: InferenceEngine, question: str, **options: Any) -> list[str]:
    return [one.name for one in engine.memory.recall(question, **options)]


def test_the_best_text_comes_first(engine: InferenceEngine, tmp_path: Path) -> None:
    fill(engine)
    found = engine.memory.recall("How many boats are red?", k=2)
    assert found[0].name == "boats" and found[0].text == TEXTS["boats"] and found[0].kind == "text"
    assert [one.score for one in found] == sorted([one.score for one in found], reverse=True)
    assert names(engine, "Why does bread rise?", k=1) == ["bread"]
    assert names(engine, "xylophone") == []
    with InferenceEngine(ToyModel(), session_dir=tmp_path) as another:
        assert names(another, "What do bees tell?", k=1) == ["bees"]
        another.memory.add("Bees make honey, and bees make wax.", "bees")
        another.memory.forget("boats")
    assert names(engine, "red boats") == [] and engine.memory.texts()["bees"].startswith("Bees make")
    assert "boats" not in (tmp_path / "texts.jsonl").read_text()
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "texts.jsonl").stat().st_mode) == 0o600


def test_sessions_are_found_by_what_was_said(engine: InferenceEngine) -> None:
    fill(engine)
    engine.session("garden").append("the roses want water in the evening")
    engine.session("kitchen").append("the oven wants cleaning")
    assert names(engine, "when do roses get water", kinds=["session"], k=1) == ["garden"]
    assert "garden" not in names(engine, "when do roses get water", kinds=["text"])
    engine.session("garden").forget()
    assert "garden" not in names(engine, "when do roses get water")


def test_a_recalled_session_can_be_brought_into_the_cache(tmp_path: Path) -> None:
    text = "the roses want water in the evening"
    with InferenceEngine(ToyModel(), LetterTokenizer(), session_dir=tmp_path) as engine:
        engine.session("garden").append(text)
    with InferenceEngine(ToyModel(), LetterTokenizer(), session_dir=tmp_path, cache_tokens=4000) as engine:
        assert names(engine, "roses") == ["garden"] and engine.stats().prefix_pages == 0
        assert names(engine, "roses", preload=True) == ["garden"]
        assert engine.stats().prefix_pages == len(text) // 4
        busy = engine.session("garden")
        turn = busy.submit("a", max_new_tokens=1)
        assert names(engine, "roses", preload=True) == ["garden"]  # in use: nothing to do
        turn.result()


def test_an_encoder_ranks_instead(engine: InferenceEngine) -> None:
    fill(engine)
    calls = []

    def letters(text: str) -> list[float]:
        calls.append(text)
        return [text.count(letter) for letter in "bz"]

    assert names(engine, "bbbb", k=1, encoder=letters) == ["boats"]
    assert len(calls) == 4
    engine.memory.encoder = letters
    assert names(engine, "zzzz b", k=3) and len(calls) == 5  # each text is encoded once
    with pytest.raises(ConfigError, match="encoder gives no vector of numbers"):
        engine.memory.recall("a", encoder=lambda text: "no")
    with pytest.raises(ConfigError, match="not all finite"):
        engine.memory.recall("a", encoder=lambda text: [float("nan")])
    with pytest.raises(ConfigError, match="of 2 and of 1 values"):
        engine.memory.recall("aa", encoder=lambda text: [1.0] * (2 if text == "aa" else 1))


def test_wrong_values_are_named(engine: InferenceEngine, tmp_path: Path) -> None:
    for call, match in [
        (lambda: engine.memory.add("  "), "text is '  '"),
        (lambda: engine.memory.add("a", ""), "name is ''"),
        (lambda: engine.memory.forget("nothing"), "there is no text of this name"),
        (lambda: engine.memory.recall("a", 0), "k is 0"),
        (lambda: engine.memory.recall(5), "text is 5; it must be a text"),  # type: ignore[arg-type]
        (lambda: engine.memory.recall("a", kinds=["page"]), "kinds is"),  # type: ignore[list-item]
    ]:
        with pytest.raises((RequestError, ConfigError), match=match):
            call()
    engine.memory.add("one two", "one")
    path = tmp_path / "texts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "torn", "te')  # killed while it was written
    assert list(engine.memory.texts()) == ["one"]
    engine.memory.add("three four", "three")
    assert list(engine.memory.texts()) == ["one", "three"] and b"torn" not in path.read_bytes()
    path.write_bytes(b"nonsense\n" + whole)
    with InferenceEngine(ToyModel(), session_dir=tmp_path) as another, pytest.raises(FormatError, match="line 1 after"):
        another.memory.texts()
