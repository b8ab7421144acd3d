"""`mnemos chat`: history, commands, and what interrupts it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mnemos.cli import chat
from mnemos.cli.main import main
from mnemos.errors import CapacityError
from tests.cli.scripted import ScriptedEngine, loads


def talk(
    engine: ScriptedEngine, lines: list[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...] = ()
) -> int:
    monkeypatch.setattr(chat, "load_engine", loads(engine))
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "model", *options])


def test_the_model_sees_the_whole_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(["Hello", "!"], ["Fine."])
    assert talk(engine, ["Hi", "", "How are you?"], monkeypatch) == 0
    assert engine.tokenizer.texts == ["user: Hi", "user: Hi\nassistant: Hello!\nuser: How are you?"]
    assert capsys.readouterr().out == "Hello!\nFine.\n"


def test_reset_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(["one"], ["two"])
    assert talk(engine, ["a", "/reset", "b"], monkeypatch, ("--system", "Be short.")) == 0
    assert engine.tokenizer.texts == ["system: Be short.\nuser: a", "system: Be short.\nuser: b"]


def test_exit_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    assert talk(engine, ["/exit", "never read"], monkeypatch) == 0
    assert engine.tokenizer.texts == []


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(ScriptedEngine(), ["/help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("/help", "/reset", "/save FILE", "/exit"))


def test_saving_as_json_and_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structured, plain = tmp_path / "a b.json", tmp_path / "talk.txt"
    lines = ["Grüße", f"/save {structured}", f"/save {plain}"]
    assert talk(ScriptedEngine(["Hallo"]), lines, monkeypatch) == 0
    assert json.loads(structured.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "Grüße"},
        {"role": "assistant", "content": "Hallo"},
    ]
    assert plain.read_text(encoding="utf-8") == "user: Grüße\n\nassistant: Hallo\n\n"


@pytest.mark.parametrize("line", ["/save", "/save /no/such/folder/file", "/sing"])
def test_a_wrong_command_ends_nothing(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(ScriptedEngine(["answer"]), [line, "Hi"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("mnemos: error: ") and captured.out == "answer\n"


def test_an_interrupted_answer_is_kept_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(["This", " is", KeyboardInterrupt()], ["ok"])
    assert talk(engine, ["a", "b"], monkeypatch) == 0
    assert engine.tokenizer.texts[-1] == "user: a\nassistant: This is\nuser: b"


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), CapacityError("the queue is full")])
def test_an_exchange_without_an_answer_is_forgotten(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine([problem], ["ok"])
    assert talk(engine, ["a", "b"], monkeypatch) == 0
    assert engine.tokenizer.texts[-1] == "user: b"


def test_the_oldest_exchanges_leave_a_full_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(["one two three four"], ["five six"], ["end"], context=20)
    assert talk(engine, ["a b c d", "e f", "g"], monkeypatch, ("--system", "S")) == 0
    assert engine.tokenizer.texts[-1] == "system: S\nuser: e f\nassistant: five six\nuser: g"
    assert "the oldest 1 exchange forgotten" in capsys.readouterr().err


def test_a_message_too_long_for_the_context_is_refused_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(["ok"], context=20)
    assert talk(engine, ["word " * 30, "short"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert "takes 31 tokens, the context has room for 15" in captured.err
    assert captured.out == "ok\n"


def test_a_model_without_a_template_cannot_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(ScriptedEngine(template=None), [], monkeypatch) == 2
    assert "no chat template" in capsys.readouterr().err
