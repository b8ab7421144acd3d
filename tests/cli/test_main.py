"""The command itself: help, errors in one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from mnemos.cli import main as main_module
from mnemos.cli.main import COMMANDS, main
from mnemos.errors import ConfigError, FormatError, MissingDependencyError


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    return tmp_path


def usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mnemos: error: ") and error.count("\n") == 1
    return error


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr("mnemos.cli.models.run", run)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"mnemos {command}" in text.partition("\n")[0]
    assert "examples:" in text


@pytest.mark.parametrize(
    "words",
    [
        ["m.gguf", "--raw", "a prompt", "--seed", "3"],
        ["--raw", "--seed", "3", "m.gguf", "a prompt"],
        ["--seed", "3", "m.gguf", "--raw", "--", "a prompt"],
    ],
)
def test_options_stand_anywhere_among_the_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("mnemos.cli.generate.run", lambda arguments: seen.append(arguments) or 0)
    assert main(["generate", *words]) == 0
    assert (seen[0].model, seen[0].prompt, seen[0].raw, seen[0].seed) == ("m.gguf", "a prompt", True, 3)


# What a process that only samples starts faster without.
SELDOM = (
    "mnemos.decoding.beam",
    "mnemos.decoding.contrastive",
    "mnemos.decoding.cutoffs",
    "mnemos.decoding.dola",
    "mnemos.decoding.dry",
    "mnemos.decoding.forced",
    "mnemos.decoding.grammar",
    "mnemos.decoding.guidance",
    "mnemos.decoding.options",
    "mnemos.decoding.prompt_scores",
    "mnemos.decoding.speculative",
    "mnemos.engine.decide",
    "mnemos.engine.embedding",
    "mnemos.engine.statistics",
    "jinja2",
    "llguidance",
    "tokenizers",
    "torch",
    "transformers",
)


def test_help_lists_all_commands_and_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert all(command in capsys.readouterr().out for command in ("generate",))
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("mnemos ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["genrate"], "invalid choice: 'genrate'; did you mean generate?"),
        (["xyz"], "invalid choice: 'xyz'; the choices are generate, chat,"),
        (["generate", "m", "p", "--temperatur", "1"], "arguments: --temperatur 1; did you mean --temperature?"),
        (["generate", "m", "p", "--kv-dtyp=int8"], "arguments: --kv-dtyp=int8; did you mean --kv-dtype?"),
        (["chat", "m", "p"], "unrecognized arguments: p (see mnemos chat --help)"),
        (["pull"], "required: MODEL"),
        (["models", "--remov", "x"], "unrecognized arguments"),
        (["generate", "x", "--top-k", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in usage_error(argv, capsys)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FormatError("a.gguf: broken"), 1, "mnemos: error: a.gguf: broken"),
        (ConfigError("top_k is -1"), 2, "mnemos: error: top_k is -1"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "mnemos: error: x.txt: No such file"),
        (MemoryError(), 1, "mnemos: error: not enough memory"),
        (
            ZeroDivisionError("a\nb"),
            1,
            "mnemos: error: unexpected ZeroDivisionError: a b (--debug shows the traceback)",
        ),
        (KeyboardInterrupt(), 130, "mnemos: interrupted"),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert main(["models"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


@pytest.mark.parametrize("words", [["serve", "smollm2-135m"], ["serve", "--help"]])
def test_a_missing_package_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnemos.cli.serve.find_spec", lambda name: None)
    assert main(words) == 1
    line = "mnemos: error: fastapi is not installed; the server needs it: pip install 'mnemos[serve]'\n"
    assert capsys.readouterr().err == line
    with pytest.raises(MissingDependencyError):
        main([*words, "--debug"])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(FormatError("broken"), monkeypatch)
    with pytest.raises(FormatError):
        main(["models", "--debug"])


def test_a_reader_that_left_is_no_error() -> None:
    command = f"'{sys.executable}' -c 'import sys; from mnemos.cli.main import main; sys.exit(main([\"models\"]))'"
    script = f"({command}; echo $? >&2) | true"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.stderr in ("141\n", "0\n")  # 0 if it had written before the reader left


def test_the_process_ends_with_its_command(tmp_path: Path) -> None:
    def run(argv: list[str], before: str = "") -> tuple[int, str]:
        script = f"import sys; from mnemos.cli.main import main; sys.argv[1:] = {argv}; {before}; main(); print('on')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()[-1] if done.stdout else ""

    last_words = "import atexit; atexit.register(print, 'last words')"
    assert run(["models"], last_words) == (0, "last words")
    assert run(["inspect", str(tmp_path / "none.gguf")], last_words) == (1, "last words")
    for still_needed in (
        "import threading; threading.Thread(target=threading.main_thread().join).start()",
        "sys.setprofile(lambda *event: None)",
    ):
        assert run(["models"], still_needed) == (0, "on")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    command = [sys.executable, "-m", "mnemos", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "No space left on device" in done.stderr


def test_a_command_imports_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from mnemos.cli.main import main; main(['models']); print([m for m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1]
    assert "mnemos.cli.models" in loaded
    for heavy in ("numpy", "mnemos.cli.generate", "mnemos.decoding", "tokenizers", "jinja2"):
        assert f"'{heavy}'" not in loaded


def test_an_engine_imports_only_what_generating_needs() -> None:
    modules = "mnemos.cli.generate, mnemos.decoding.build, mnemos.engine.engine, mnemos.engine.thread"
    code = f"import sys, {modules}; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "'mnemos.decoding.sampling'" in done.stdout
    for module in SELDOM:
        assert f"'{module}'" not in done.stdout


def test_signals_do_not_leave_their_mark_on_threads() -> None:
    import threading

    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["models"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert main_module.TERMINATED == 143


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: object) -> int:
        warnings.warn("the file says\nsomething odd", stacklevel=1)
        return 0

    monkeypatch.setattr("mnemos.cli.models.run", run)
    assert main(["models"]) == 0
    assert capsys.readouterr().err == "mnemos: warning: the file says something odd\n"
