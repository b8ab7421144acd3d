"""A session continues across requests, engines and processes, with the same bits and without being read again."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, FormatError, MnemosError, RequestError, UnsupportedError
from tests.engine.toys import LetterTokenizer, ReaderToy, StateToy, ToyModel, Windows, toy_greedy

FIRST = list(range(1, 40))
WINDOWS = [0, (0, 6), 9, (9, 6)]


def engine_at(folder: Path, window: Windows = 0, **options: Any) -> InferenceEngine:
    options = {"cache_tokens": 4000, **options}
    return InferenceEngine(ToyModel(window=window, fingerprint=str(window)), session_dir=folder, **options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with engine_at(tmp_path) as made:
        yield made


def test_a_text_goes_on_from_turn_to_turn(engine: InferenceEngine) -> None:
    session = engine.session("notes")
    first = session.generate(FIRST, max_new_tokens=5)
    assert first == toy_greedy(FIRST, 5)
    second = session.generate([50, 51], max_new_tokens=3)
    assert second == toy_greedy([*FIRST, *first, 50, 51], 3)
    assert session.generate(None, max_new_tokens=2) == toy_greedy([*FIRST, *first, 50, 51, *second], 2)
    assert session.tokens[: len(FIRST)] == FIRST and session.turns == 3 and len(session.tokens) == 39 + 5 + 2 + 3 + 2
    assert engine.session("notes") is session
    (listed,) = engine.sessions()
    assert not isinstance(listed, FormatError)
    assert (listed.name, listed.turns, listed.tokens, listed.bytes) == ("notes", 3, 51, session.size)


@pytest.mark.parametrize("window", WINDOWS)
def test_another_engine_continues_without_reading_again(tmp_path: Path, window: Windows) -> None:
    with engine_at(tmp_path, window) as engine:
        first = engine.session("notes").generate(FIRST, max_new_tokens=5)
    with engine_at(tmp_path, window) as engine:
        session = engine.session("notes")
        said = session.tokens
        assert said == FIRST + first
        completion = session.submit([60, 61], max_new_tokens=6).result()
        assert completion.token_ids == toy_greedy([*said, 60, 61], 6, window)
        assert completion.usage.cached_tokens == 40
        assert session.tokens == [*said, 60, 61, *completion.token_ids]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_small_cache_restores_what_fits(tmp_path: Path, window: Windows) -> None:
    with engine_at(tmp_path, window) as engine:
        said = [*FIRST, *engine.session("notes").generate(FIRST, max_new_tokens=20)]
    with engine_at(tmp_path, window, cache_tokens=80, max_batch_tokens=8) as engine:
        for seed in range(6):  # other texts, whose pages make room
            engine.generate([90 - seed] * 40, max_new_tokens=1)
        session = engine.session("notes")
        assert session.generate([60], max_new_tokens=6) == toy_greedy([*said, 60], 6, window)
        assert engine.stats().pages_used == engine.stats().pages_cached


def test_what_is_appended_is_read_and_kept(tmp_path: Path) -> None:
    with engine_at(tmp_path) as engine:
        assert engine.session("notes").append(FIRST) == 39
        evaluated = engine.stats().evaluated_tokens
    assert evaluated == 39
    with engine_at(tmp_path) as engine:
        completion = engine.session("notes").submit([7], max_new_tokens=1).result()
        assert completion.token_ids == toy_greedy([*FIRST, 7], 1)
        assert engine.stats().evaluated_tokens == 40 - 36


def test_a_stream_that_is_left_early_keeps_what_it_has_said(engine: InferenceEngine) -> None:
    session, said = engine.session("notes"), []
    stream = session.stream(FIRST, max_new_tokens=50)
    for token in stream:
        said.append(token.token_id)
        if len(said) == 3:
            break
    stream.close()  # type: ignore[attr-defined]
    assert session.tokens[: 39 + 3] == FIRST + said and session.turns == 1
    assert session.tokens[39:] == toy_greedy(FIRST, len(session.tokens) - 39)
    whole = [token.token_id for token in session.stream(max_new_tokens=4)]
    assert session.tokens[-4:] == whole and session.turns == 2


def test_a_turn_that_fails_leaves_no_trace(engine: InferenceEngine) -> None:
    session = engine.session("notes")
    session.generate(FIRST, max_new_tokens=2)
    before = session.tokens
    engine.model.fail_on = 66
    with pytest.raises(MnemosError, match="the toy broke"):
        session.generate([66], max_new_tokens=2)
    with pytest.raises(MnemosError, match="the toy broke"):
        list(session.stream([66], max_new_tokens=2))
    with pytest.raises(RequestError, match="num_return_sequences is 2"):
        session.generate([5], n=2, temperature=1.0)
    with pytest.raises(RequestError, match="the token id 9999"):
        session.append([9999])
    assert session.tokens == before and session.turns == 1
    session.submit([5], max_new_tokens=2)  # dropped at once
    assert session.tokens == before
    assert session.generate([5], max_new_tokens=2) == toy_greedy([*before, 5], 2)


def test_one_turn_at_a_time(engine: InferenceEngine) -> None:
    session = engine.session("notes")
    turn = session.submit(FIRST, max_new_tokens=3)
    for other in (lambda: session.generate([3]), lambda: session.append([3]), session.rewind, session.forget):
        with pytest.raises(CapacityError, match="'notes' has a turn in progress"):
            other()
    turn.result()
    assert session.append([3]) == 43


@pytest.mark.parametrize("window", WINDOWS)
def test_a_rewound_session_is_what_it_was(tmp_path: Path, window: Windows) -> None:
    with engine_at(tmp_path, window) as engine:
        session = engine.session("notes")
        lengths, sizes = [], []
        for prompt in (FIRST, [50] * 10, [51] * 10):
            session.generate(prompt, max_new_tokens=4)
            lengths.append(len(session.tokens))
            sizes.append(session.size)
        said = session.tokens
        session.rewind()
        assert session.tokens == said[: lengths[1]] and session.size == sizes[1]
        assert session.generate([8], max_new_tokens=6) == toy_greedy([*said[: lengths[1]], 8], 6, window)
        session.rewind(2)
        assert session.tokens == said[: lengths[0]] and session.turns == 1
        session.rewind(tokens=30)
        assert session.tokens == FIRST[:30]
        with pytest.raises(RequestError, match="turns is 4; the session 'notes' has 1"):
            session.rewind(4)
        with pytest.raises(RequestError, match="tokens is 31; the session 'notes' is 30 long"):
            session.rewind(tokens=31)
    with engine_at(tmp_path, window) as engine:
        assert engine.session("notes").generate([9], max_new_tokens=6) == toy_greedy([*FIRST[:30], 9], 6, window)


def test_a_fork_goes_its_own_way(tmp_path: Path) -> None:
    with engine_at(tmp_path) as engine:
        session = engine.session("notes")
        session.generate(FIRST, max_new_tokens=4)
        first = session.tokens
        session.generate([50] * 10, max_new_tokens=4)
        fork, early = session.fork("other"), session.fork("early", turns=1)
        assert fork.tokens == session.tokens and early.tokens == first
        fork.generate([3], max_new_tokens=2)
        assert len(session.tokens) == len(fork.tokens) - 3
        with pytest.raises(FormatError, match="'other' exists"):
            session.fork("other")
        with pytest.raises(RequestError, match="turns is 3"):
            session.fork("third", turns=3)
    with engine_at(tmp_path) as engine:
        completion = engine.session("early").submit([4], max_new_tokens=3).result()
        assert completion.token_ids == toy_greedy([*first, 4], 3) and completion.usage.cached_tokens == 40
        assert sorted(file.name for file in tmp_path.iterdir()) == ["early.session", "notes.session", "other.session"]


def test_forgetting_deletes(engine: InferenceEngine, tmp_path: Path) -> None:
    session = engine.session("notes")
    session.generate(FIRST, max_new_tokens=4)
    engine.generate([*FIRST[:20], 77, 77, 77, 77], max_new_tokens=1)
    session.forget()
    assert not list(tmp_path.iterdir()) and session.closed
    assert engine.complete(FIRST, max_new_tokens=1).usage.cached_tokens == 20  # what the other text has too
    with pytest.raises(RequestError, match="closed"):
        session.generate([3])
    assert engine.session("notes").tokens == [] and engine.session("notes") is not session
    assert not list(tmp_path.iterdir())  # nothing was said in it


def test_files_are_the_users_own(engine: InferenceEngine, tmp_path: Path) -> None:
    session = engine.session("notes", tenant="one")
    session.generate(FIRST, max_new_tokens=4)
    empty = engine.session("notes", tenant="two")
    assert empty.tokens == [] and not engine.sessions(tenant="two") and not engine.sessions()
    empty.close()
    assert len(engine.sessions(tenant="one")) == 1 and engine.sessions(tenant="two") == []
    (folder,) = [path for path in tmp_path.iterdir() if list(path.iterdir())]
    (file,) = folder.iterdir()
    assert "one" not in folder.name
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "../notes", "a/b", ".hidden", "a" * 101, "ä", None])
def test_names_are_no_paths(engine: InferenceEngine, name: Any) -> None:
    with pytest.raises(ConfigError, match="session is"):
        engine.session(name)


def test_a_session_belongs_to_one_model(tmp_path: Path) -> None:
    with engine_at(tmp_path) as engine:
        engine.session("notes").generate(FIRST, max_new_tokens=4)
    for other in (ToyModel(fingerprint="another"), ToyModel(fingerprint="0", page_size=8)):
        with (
            InferenceEngine(other, session_dir=tmp_path) as engine,
            pytest.raises(FormatError, match=r"'notes' was made by the model 'toy' \('0'"),
        ):
            engine.session("notes")
    small = ToyModel(fingerprint="0", page_size=8)
    with (
        InferenceEngine(small, session_dir=tmp_path) as engine,
        pytest.raises(FormatError, match="page_size is 8, there"),
    ):
        engine.session("notes")
    with InferenceEngine(ReaderToy(), session_dir=tmp_path) as engine, pytest.raises(UnsupportedError, match="encoder"):
        engine.session("notes")
    with engine_at(tmp_path) as engine:
        assert len(engine.session("notes").tokens) == 43


@pytest.mark.parametrize("model", [StateToy, lambda: ToyModel(fingerprint=""), lambda: ToyModel(shares_prefixes=False)])
def test_a_model_without_shared_prefixes_reads_its_session_again(tmp_path: Path, model: Any) -> None:
    with InferenceEngine(model(), session_dir=tmp_path) as engine:
        session = engine.session("notes")
        session.generate(FIRST, max_new_tokens=4)
        said = session.tokens
    with InferenceEngine(model(), session_dir=tmp_path) as engine:
        assert (
            engine.session("notes").generate([5], max_new_tokens=4)
            == engine.generate([*said, 5], max_new_tokens=4)[-4:]
        )


@pytest.mark.parametrize("wrong", ["x", 1.5, True, -1])
def test_numbers_of_turns_are_whole(engine: InferenceEngine, wrong: Any) -> None:
    session = engine.session("notes")
    session.append(FIRST)
    for change in (
        lambda: session.rewind(wrong),
        lambda: session.rewind(tokens=wrong),
        lambda: session.fork("other", turns=wrong),
        lambda: session.drop(wrong),
    ):
        with pytest.raises(ConfigError, match="must be a whole number"):
            change()
    assert session.tokens == FIRST
    session.rewind(tokens=np.int64(2))
    assert session.tokens == FIRST[:2]


def test_nothing_is_left_of_a_forgotten_session(engine: InferenceEngine) -> None:
    session = engine.session("notes")
    session.append(FIRST)
    session.forget()
    assert (session.tokens, session.messages, session.turns) == ([], [], 0)


def test_two_processes_cannot_have_one_session(engine: InferenceEngine, tmp_path: Path) -> None:
    session = engine.session("notes")
    session.generate(FIRST, max_new_tokens=4)
    program = (
        "from mnemos.memory.session_file import SessionFile\n"
        "from mnemos.memory.session_records import Binding\n"
        "from pathlib import Path\n"
        f"SessionFile(Path({str(tmp_path / 'notes.session')!r}), Binding('', '', {{}}, [], 4), 'notes')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "CapacityError" in ended.stderr and "'notes' is in use" in ended.stderr
    with engine_at(tmp_path) as other, pytest.raises(CapacityError, match="in use"):
        other.session("notes")
    session.close()
    with engine_at(tmp_path) as other:
        assert len(other.session("notes").tokens) == 43


def test_a_full_disk_costs_pages_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = [0]

    def write(descriptor: int, content: Any, original: Any = os.write) -> int:
        if os.lseek(descriptor, 0, os.SEEK_CUR) + len(content) > largest[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(original(descriptor, content))

    with engine_at(tmp_path) as engine:
        session = engine.session("notes")
        session.generate(FIRST, max_new_tokens=4)
        said = session.tokens
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(CapacityError, match="cannot be stored: No space left"):
            session.generate([5] * 20, max_new_tokens=2)
        assert session.tokens == said
        largest[0] = session.size + 240  # enough for the turn, or for its pages
        with pytest.warns(UserWarning, match="not for its cache pages"):
            session.generate([5] * 20, max_new_tokens=2)
        monkeypatch.undo()
        said = session.tokens
    with engine_at(tmp_path) as engine:
        completion = engine.session("notes").submit([6], max_new_tokens=2).result()
        assert completion.token_ids == toy_greedy([*said, 6], 2) and completion.usage.cached_tokens == 40


def test_a_text_with_a_tokenizer(tmp_path: Path) -> None:
    with InferenceEngine(ToyModel(), LetterTokenizer(), session_dir=tmp_path) as engine:
        session = engine.session("notes")
        answer = session.generate("hello", max_new_tokens=4)
        assert isinstance(answer, str) and session.text == "hello" + answer
        assert engine.generate("hello" + answer + "bye", max_new_tokens=3) == session.generate("bye", max_new_tokens=3)


def test_what_an_adapter_has_read_is_read_again(tmp_path: Path) -> None:
    def adapted() -> ToyModel:
        model = ToyModel()
        model.spec = replace(model.spec, adapters=("sql",))
        return model

    with InferenceEngine(adapted(), cache_tokens=4000, session_dir=tmp_path) as engine:
        session = engine.session("notes")
        session.append(FIRST, adapter="sql")
        assert session.submit([3], max_new_tokens=1).result().usage.cached_tokens == 0
    with InferenceEngine(adapted(), cache_tokens=4000, session_dir=tmp_path) as engine:
        session = engine.session("notes")
        assert session.submit([4], max_new_tokens=1, adapter="sql").result().usage.cached_tokens == 0
        assert session.submit([5], max_new_tokens=1).result().usage.cached_tokens == 40
