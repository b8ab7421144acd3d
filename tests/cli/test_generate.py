"""`mnemos generate`: which prompt the model gets, and what is shown where."""

from __future__ import annotations

import io
import itertools
import json

import pytest

from mnemos.cli import generate, streaming
from mnemos.cli.main import main
from mnemos.errors import CapacityError
from tests.cli.scripted import ScriptedEngine, loads

Answer = list[str | BaseException]


def run(engine: ScriptedEngine, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(generate, "load_engine", loads(engine))
    return main(["generate", "model", *arguments])


def test_the_answer_is_on_standard_output_and_its_speed_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "perf_counter", itertools.count(0, 0.25).__next__)
    assert run(ScriptedEngine(["The", " sky", "."]), ["Why?"], monkeypatch) == 0
    assert capsys.readouterr() == ("The sky.\n", "[3 tokens, 4 tokens/s, first after 0.25 s]\n")


def test_tokens_that_come_together_have_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "perf_counter", itertools.chain([0.0], itertools.repeat(1.5)).__next__)
    assert run(ScriptedEngine(["The", " sky", "."]), ["Why?"], monkeypatch) == 0
    assert capsys.readouterr() == ("The sky.\n", "[3 tokens after 1.50 s]\n")


def test_quiet_says_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ScriptedEngine(["x"]), ["Why?", "--quiet"], monkeypatch) == 0
    assert capsys.readouterr() == ("x\n", "")


@pytest.mark.parametrize(
    ("template", "options", "text"),
    [
        ("a template", [], "user: Why?"),
        ("a template", ["--system", "Be short."], "system: Be short.\nuser: Why?"),
        ("a template", ["--raw"], "Why?"),
        (None, [], "Why?"),
    ],
)
def test_the_chat_template_is_used_where_there_is_one(
    template: str | None, options: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(["x"], template=template)
    assert run(engine, ["Why?", *options], monkeypatch) == 0
    assert engine.tokenizer.texts == [text]


def test_standard_input_is_the_prompt_without_its_last_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    engine = ScriptedEngine(["x"])
    assert run(engine, ["--raw"], monkeypatch) == 0
    assert engine.tokenizer.texts == ["two\nlines"]


def test_options_become_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--max-new-tokens 7 --temperature 0.5 --top-k 3 --seed 9 --stop A --stop B --stop-when-repeating"
    engine = ScriptedEngine(["x"])
    assert run(engine, ["p", *options.split()], monkeypatch) == 0
    (config,) = engine.configs
    assert (config.max_new_tokens, config.temperature, config.top_k, config.seed) == (7, 0.5, 3, 9)
    assert tuple(config.stop) == ("A", "B") and config.stop_when_repeating


def test_json_is_the_whole_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ScriptedEngine(["a", "b"]), ["p", "--json"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"text": "ab"} and captured.err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "2"], "top_p"),
        (["--temperature", "nan"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--raw", "--system", "x"], "--system needs the chat template"),
        (["--num-return-sequences", "2", "--temperature", "1"], "several results need --json"),
    ],
)
def test_impossible_options_are_refused_before_the_model_is_loaded(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "load_engine", lambda arguments: pytest.fail("loaded"))
    assert main(["generate", "model", "prompt", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_empty_prompt_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run(ScriptedEngine(), [], monkeypatch) == 2
    assert "the prompt is empty; give it after the model, which is 'model' here" in capsys.readouterr().err


def test_system_without_a_template_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ScriptedEngine([], template=None), ["p", "--system", "x"], monkeypatch) == 2
    assert "model has none" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(CapacityError("no room"), 1), (KeyboardInterrupt(), 130)])
def test_what_was_shown_before_an_error_stays_a_line_of_its_own(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ScriptedEngine(["half", error]), ["p"], monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == "half\n" and captured.err.startswith("mnemos: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--speculative", "draft"], "--draft MODEL"),
        (["--draft", "small.gguf", "--speculative", "prompt_lookup"], "'prompt_lookup' and --draft 'small.gguf'"),
        (["--draft", "small.gguf", "--num-beams", "2"], "speculative"),
    ],
)
def test_drafts_are_refused_where_they_have_no_meaning(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ScriptedEngine(["x"]), ["Why?", *options], monkeypatch) == 2
    assert words in capsys.readouterr().err
