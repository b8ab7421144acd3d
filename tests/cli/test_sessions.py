"""`mnemos chat --session` and `mnemos sessions`, with the real model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mnemos.cli.main import main

QUESTION = "Name three colours of the rainbow."


def talk(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    fixed = ("--session", "rainbow", "--session-dir", str(folder), "--context", "256", "--max-new-tokens", "12")
    return main(["chat", "smollm2-135m", *fixed, *options])


@pytest.mark.usefixtures("smollm2")
def test_a_conversation_continues_in_another_process_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert talk(one, [QUESTION, "And which is your favourite?"], monkeypatch, "--system", "Be short.") == 0
    together = capsys.readouterr().out
    assert talk(two, [QUESTION], monkeypatch, "--system", "Be short.") == 0
    saved = two / "talk.json"
    assert talk(two, ["And which is your favourite?", f"/save {saved}"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out == together and "goes on after 1 message of yours" in captured.err
    roles = [message["role"] for message in json.loads(saved.read_text())]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert talk(two, [], monkeypatch, "--system", "Be long.") == 2
    assert "system is 'Be long.', and the session 'rainbow' began with 'Be short.'" in capsys.readouterr().err
    assert talk(two, ["/reset"], monkeypatch) == 0
    assert main(["sessions", "--session-dir", str(two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.usefixtures("smollm2")
def test_a_full_context_forgets_the_oldest_exchanges_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [f"{QUESTION} This is question number {number} of {'many ' * 20}" for number in range(4)]
    assert talk(tmp_path, questions, monkeypatch) == 0
    assert "the context is full: the oldest" in capsys.readouterr().err
    saved = tmp_path / "talk.json"
    assert talk(tmp_path, [f"/save {saved}"], monkeypatch) == 0
    said = json.loads(saved.read_text())
    assert "number 3" in said[-2]["content"] and "number 0" not in str(said) and len(said) % 2 == 0
    capsys.readouterr()
    assert main(["sessions", "--session-dir", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rainbow ") and "tokens" in line
    assert main(["sessions", "--session-dir", str(tmp_path), "--forget", "rainbow"]) == 0
    assert capsys.readouterr().out == "forgot rainbow\n" and not list(tmp_path.glob("*.session"))
    assert main(["sessions", "--session-dir", str(tmp_path), "--forget", "rainbow"]) == 1
    assert "there is no session 'rainbow'" in capsys.readouterr().err


def test_broken_files_are_listed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions", "--session-dir", str(tmp_path)]) == 0
    assert "There are no sessions in" in capsys.readouterr().err
    (tmp_path / "broken.session").write_bytes(b"nothing")
    assert main(["sessions", "--session-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "not a session" in captured.err
