"""A session's file: what was ended stays whatever happens, and what is wrong with a file is named."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from mnemos.errors import CapacityError, FormatError
from mnemos.memory import session_file
from mnemos.memory.session_file import SessionFile, summary_of
from mnemos.memory.session_folder import forget_session, list_sessions, session_folder, session_path
from mnemos.memory.session_records import (
    MAGIC,
    PAGES,
    VERSION,
    Binding,
    StoredPage,
    Turn,
    start_record,
    turn_record,
)

BINDING = Binding("toy", "print", {"dtype": "float16"}, [10, 6], 4)
TURNS = [
    (Turn(0, list(range(9)), [{"role": "user", "content": "hé"}]), [(0, 0), (1, 0), (0, 1), (1, 1)]),
    (Turn(9, [20, 21, 22, 23]), [(0, 2), (1, 2)]),
    (Turn(10, [30, 31, 32, 33, 34, 35]), [(0, 2), (1, 2), (0, 3)]),
]


def content(group: int, number: int, turn: int) -> bytes:
    return bytes([group * 100 + number * 10 + turn]) * BINDING.page_bytes[group]


def pages_of(turn: int) -> list[StoredPage]:
    return [StoredPage(group, number, content(group, number, turn)) for group, number in TURNS[turn][1]]


def page_of(file: SessionFile, key: tuple[int, int]) -> bytes | None:
    """A page's content, in bytes of its own."""
    page = file.page(key, memoryview(bytearray(max(file.binding.page_bytes))))
    return None if page is None else bytes(page)


def opened(folder: Path, name: str = "notes", binding: Binding = BINDING) -> SessionFile:
    return SessionFile(session_path(folder, name), binding, name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = opened(tmp_path)
    for number, (turn, _) in enumerate(TURNS):
        file.append(turn, pages_of(number))
    file.close()
    return file.path


def test_what_was_ended_is_found_again(saved: Path) -> None:
    file = opened(saved.parent)
    assert file.turns == [turn for turn, _ in TURNS]
    assert file.tokens == [0, 1, 2, 3, 4, 5, 6, 7, 8, 20, 30, 31, 32, 33, 34, 35]
    assert file.messages == [{"role": "user", "content": "hé"}]
    assert file.keys == {(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3)}
    assert page_of(file, (1, 1)) == content(1, 1, 0) and page_of(file, (0, 2)) == content(0, 2, 2)
    assert page_of(file, (1, 3)) is None
    file.rewind(2)
    assert page_of(file, (0, 2)) == content(0, 2, 1) and file.size == saved.stat().st_size


def test_a_page_that_its_text_has_left_is_gone(saved: Path) -> None:
    file = opened(saved.parent)
    file.append(Turn(6, [50]))
    assert file.keys == {(0, 0), (1, 0)} and file.tokens == [0, 1, 2, 3, 4, 5, 50]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_file_that_ends_anywhere_has_every_ended_turn(
    saved: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole = saved.read_bytes()
    file = opened(saved.parent)
    ends = [ended.end for ended in file._ended]
    begin = file._begin
    file.close()
    for end in range(int(share * len(whole)), int((share + 0.11) * len(whole))):
        saved.write_bytes(whole[:end])
        file = opened(saved.parent)
        count = sum(one <= end for one in ends)
        assert file.turns == [turn for turn, _ in TURNS[:count]]
        assert saved.stat().st_size == ([begin, *ends][count])
        for number in range(count, len(TURNS)):
            file.append(TURNS[number][0], pages_of(number))
        file.close()
        assert saved.read_bytes() == whole


def test_every_damaged_byte_is_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage before the last turn's end is an error, or costs pages, or the last turn if that is all that is left."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole = saved.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            file = opened(saved.parent)
        except FormatError as error:
            assert str(saved) in str(error)
            assert saved.stat().st_size == len(whole)  # nothing was cut off
            refused += 1
            continue
        assert file.turns == [turn for turn, _ in TURNS][: len(file.turns)] and len(file.turns) >= 2
        written = {key: turn for turn in range(len(file.turns)) for key in TURNS[turn][1]}
        for key in file.keys:
            page = page_of(file, key)
            assert page is None or page == content(*key, written[key])
        file.close()
    assert refused > len(whole) // 9


def test_damage_to_a_table_of_pages_costs_those_pages(saved: Path) -> None:
    whole = saved.read_bytes()
    at = whole.index(PAGES) + 16 + 5
    saved.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    file = opened(saved.parent)
    assert file.turns == [turn for turn, _ in TURNS] and file.keys == {(0, 2), (1, 2), (0, 3)}


def test_files_of_the_first_version_are_read_and_continued(tmp_path: Path) -> None:
    """They have a record for each page."""

    def record(mark: bytes, first: int, second: int, body: bytes) -> bytes:
        head = struct.pack("<4sIII", mark, first, second, 0)
        return head[:12] + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body

    start = start_record("notes", BINDING)
    start = start[:8] + struct.pack("<I", 1) + start[12:-4]
    parts = [start, struct.pack("<I", zlib.crc32(start))]
    for turn in range(2):
        parts += [record(b"PAGE", page.group, page.number, page.content) for page in pages_of(turn)]
        parts.append(turn_record(TURNS[turn][0], turn))
    path = session_path(tmp_path, "notes")
    path.write_bytes(b"".join(parts))
    for turns in (2, 3):
        file = opened(tmp_path)
        assert file.turns == [turn for turn, _ in TURNS[:turns]]
        written = {key: turn for turn in range(turns) for key in TURNS[turn][1]}
        assert {key: page_of(file, key) for key in file.keys} == {key: content(*key, written[key]) for key in file.keys}
        if turns == 2:
            assert len(file.keys) == 6
            file.append(TURNS[2][0], pages_of(2))
        file.close()


def test_foreign_and_future_files_are_refused_and_stay(tmp_path: Path) -> None:
    path = session_path(tmp_path, "notes")
    for text, match in [
        (b"GGUF and more of it", "not a session: it begins with b'GGUF"),
        (b"no", "not a session"),
        (
            struct.pack("<8sII", MAGIC, VERSION + 1, 10) + b"x" * 40,
            f"{VERSION + 1}; this program reads versions 1 to",
        ),
        (struct.pack("<8sII", MAGIC, VERSION, 1 << 30) + b"x" * 40, "the header has"),
    ]:
        path.write_bytes(text)
        for use in (lambda: opened(tmp_path), lambda: summary_of(path)):
            with pytest.raises(FormatError, match=match):
                use()
        assert path.read_bytes() == text
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError, match="cannot be opened"):
        opened(tmp_path)


def test_a_session_of_another_name_or_model_is_refused_and_stays(saved: Path) -> None:
    whole = saved.read_bytes()
    for binding in (
        Binding("other", "print2", BINDING.layout, [10, 6], 4),
        Binding("toy", "print", {"dtype": "int8"}, [10, 6], 4),
        Binding("toy", "print", BINDING.layout, [10, 7], 4),
    ):
        with pytest.raises(FormatError, match=r"made by the model 'toy' \('print'\); this one is"):
            opened(saved.parent, binding=binding)
    saved.rename(saved.with_name("Notes.session"))
    with pytest.raises(FormatError, match="that of the session 'notes', not 'Notes'"):
        opened(saved.parent, "Notes")
    assert saved.with_name("Notes.session").read_bytes() == whole


def test_it_is_open_once(saved: Path) -> None:
    file = opened(saved.parent)
    with pytest.raises(CapacityError, match="'notes' is in use"):
        opened(saved.parent)
    with pytest.raises(CapacityError, match="in use"):
        forget_session(saved.parent, "notes")
    assert summary_of(saved).turns == 3  # it may be looked at
    file.close()
    opened(saved.parent).close()


def test_pages_that_were_replaced_leave_the_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_file, "_SLACK", 20)
    file = opened(saved.parent)
    for token in range(5):
        file.append(Turn(4, [token] * 6), [StoredPage(0, 1, bytes([token]) * 10), StoredPage(1, 1, bytes([token]) * 6)])
    assert (
        saved.read_bytes().count(b"PAGE") < 12
        and page_of(file, (0, 1)) == bytes([4]) * 10
        and page_of(file, (0, 0)) == content(0, 0, 0)
    )
    with pytest.raises(CapacityError):  # the new file is locked too
        opened(saved.parent)
    file.close()
    file = opened(saved.parent)
    assert len(file.turns) == 8 and file.tokens == [0, 1, 2, 3, *[4] * 6]
    assert page_of(file, (0, 1)) == bytes([4]) * 10 and page_of(file, (1, 0)) == content(1, 0, 0)
    file.rewind(3)
    assert file.turns == [turn for turn, _ in TURNS] and page_of(file, (0, 0)) == content(0, 0, 0)
    assert list(saved.parent.iterdir()) == [saved]


def test_unfinished_files_are_cleared_away(saved: Path) -> None:
    left = saved.with_name(f".{saved.name}.abc.part")
    left.write_bytes(b"half")
    other = saved.with_name(".another.session.abc.part")
    other.write_bytes(b"half")
    opened(saved.parent).close()
    assert not left.exists() and other.exists()


def test_a_folder_lists_and_forgets(saved: Path) -> None:
    folder = saved.parent
    opened(folder, "empty").close()
    newer = opened(folder, "newer")
    newer.append(Turn(0, [1, 2]))
    os.utime(newer.path, (2e9, 2e9))
    (folder / "broken.session").write_bytes(b"nothing")
    first, second, broken = list_sessions(folder)
    assert not isinstance(first, FormatError) and not isinstance(second, FormatError)
    assert (first.name, first.tokens) == ("newer", 2) and (second.name, second.tokens, second.turns) == ("notes", 16, 3)
    assert isinstance(broken, FormatError) and "broken.session" in str(broken)
    newer.close()
    forget_session(folder, "broken")
    forget_session(folder, "newer")
    assert list(folder.iterdir()) == [saved]
    with pytest.raises(FormatError, match="no session 'newer'"):
        forget_session(folder, "newer")
    assert list_sessions(folder / "nothing") == []


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    assert session_folder(None) == tmp_path / "sessions"
    monkeypatch.delenv("MNEMOS_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("sys.platform", "linux")
    assert session_folder(None) == tmp_path / "state" / "mnemos" / "sessions"
    assert session_folder(tmp_path) == tmp_path
    one, two = session_folder(tmp_path, "a/../b"), session_folder(tmp_path, "b")
    assert one.parent == two.parent == tmp_path and one != two
