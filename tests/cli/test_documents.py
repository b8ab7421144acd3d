"""What the documents say: their Python runs, their commands are understood, links lead somewhere, and extras exist."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest

from mnemos.cli.main import COMMANDS, MODULES, main
from tests.cli.documents import ROOT, run_python

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_python_in_a_document_runs(name: str, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, object] = {}
    run_python(name, values)
    values["engine"].close()  # type: ignore[attr-defined]
    assert "Paris" in capsys.readouterr().out


def commands_in(text: str) -> list[list[str]]:
    """The words after `mnemos` in each indented line that shows a command, except lines that are patterns."""
    lines = re.findall(r"^ {2,}mnemos ([a-z][^<\[\n]*)(?:<.*)?$", text, re.MULTILINE)
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] in COMMANDS]


def test_every_command_in_the_documents_and_in_the_help_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [words for name in DOCUMENTS for words in commands_in((ROOT / name).read_text(encoding="utf-8"))]
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        examples += commands_in(capsys.readouterr().out)
    understood: list[Namespace] = []
    for name in COMMANDS:
        module = MODULES.get(name, name)
        monkeypatch.setattr(f"mnemos.cli.{module}.run", lambda arguments: understood.append(arguments) or 0)
    assert {words[0] for words in examples} == set(COMMANDS)
    assert all(main(words) == 0 for words in examples)
    assert len(understood) == len(examples)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_extras_in_the_documents_are_those_of_the_package() -> None:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
    extras = set(re.findall(r"^([a-z]+) = \[", table.partition("\n[")[0], re.MULTILINE))
    named = {name: named_extras((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS}
    assert named["docs/install.md"] == extras
    assert set().union(*named.values()) == extras


def named_extras(text: str) -> set[str]:
    """The extras in what `pip install 'mnemos[...]'` is given anywhere in a text."""
    return {extra for found in re.findall(r"mnemos\[([a-z,]+)\]", text) for extra in found.split(",")}
