"""Options of the command line for loading a model."""

from __future__ import annotations

from typing import Any

import pytest

from mnemos.cli.main import main
from mnemos.decoding.memory import Memory
from mnemos.engine.options import LoadOptions, command_line


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[LoadOptions]:
    """The engine options of a command, which then ends."""
    seen: list[LoadOptions] = []

    def load_parts(source: str, options: LoadOptions) -> Any:
        seen.append(options)
        raise SystemExit(0)

    monkeypatch.setattr("mnemos.engine.pretrained.load_parts", load_parts)
    return seen


def ask(words: list[str], loaded: list[LoadOptions]) -> LoadOptions:
    with pytest.raises(SystemExit):
        main(words)
    return loaded[0]


def test_every_option_of_loading_reaches_the_loader(loaded: list[LoadOptions]) -> None:
    words = ["--context-length", "9", "--device", "cpu", "--backend", "native", "--dtype", "float32", "--kv-dtype"]
    words += ["int8", "--threads", "2", "--tokenizer", "t.json", "--draft", "small", "--trust-remote-code"]
    words += ["--adapter", "lora", "--max-memory-gb", "6", "--performance-mode", "efficiency", "--thermal-throttle"]
    words += ["--memory", "window=64,recall=96,sinks=32"]
    assert {word for word in words if word.startswith("--")} == {
        "--" + row.name.replace("_", "-") for row in command_line(LoadOptions)
    }
    options = ask(["generate", "m.gguf", "prompt", *words], loaded)
    assert (options.context_length, options.device, options.backend) == (9, "cpu", "native")
    assert (options.dtype, options.kv_dtype, options.threads) == ("float32", "int8", 2)
    assert (options.tokenizer, options.draft, options.trust_remote_code) == ("t.json", "small", True)
    assert options.adapter == "lora" and options.memory == Memory(window=64, recall=96, sinks=32)
    assert (options.max_memory_gb, options.performance_mode, options.thermal_throttle) == (6, "efficiency", True)


def test_what_is_not_given_has_its_default(loaded: list[LoadOptions]) -> None:
    options = ask(["chat"], loaded)
    assert options == LoadOptions(progress=options.progress)


def test_context_is_short_for_context_length(loaded: list[LoadOptions]) -> None:
    assert ask(["generate", "m", "p", "--context", "7"], loaded).context_length == 7


@pytest.mark.parametrize("words", [["--threads", "0"], ["--device", "gpu"], ["--kv-dtype", "fp16"]])
def test_a_bad_value_is_refused_before_anything_is_fetched(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "no-such-model", "p", *words]) == 2
    assert f"{words[0][2:].replace('-', '_')} is" in capsys.readouterr().err
