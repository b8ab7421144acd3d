"""Chat templates in Go's language: those of well-known models say in Ollama what their own say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mnemos.export.packaging.ollama import go_template
from mnemos.text.tokenizer import Tokenizer
from tests.text.metadata import byte_level
from tests.text.templates import TEMPLATES

TALK = [("user", "Why?\n Say."), ("assistant", "So."), ("user", "And <then>?"), ("assistant", ""), ("user", "{{ Go }}")]
# As Ollama runs a template: messages with their roles and contents, and all system messages once more.
GO = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct{ Role, Content string }
type Case struct { Template, System string; Messages []*Message }

func main() {
	var one Case
	if err := json.NewDecoder(os.Stdin).Decode(&one); err != nil { panic(err) }
	made := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
	values := map[string]any{"System": one.System, "Messages": one.Messages, "Response": ""}
	if err := made.Execute(os.Stdout, values); err != nil { panic(err) }
}
"""


def tokenizer_with(template: str) -> Tokenizer:
    return Tokenizer.from_metadata({**byte_level(), "tokenizer.chat_template": template}, "a test")


def test_what_is_written_around_messages() -> None:
    assert go_template(tokenizer_with(TEMPLATES["mistral"])) == (
        '{{ $last := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if $last }}<|im_end|>[INST] {{ else }}'
        "{{ if $.System }}<|start|>[INST] {{ $.System }}\n\n{{ else }}<|start|>[INST] {{ end }}{{ end }}"
        '{{ .Content }}{{ $last = .Role }}{{ else if eq .Role "assistant" }} [/INST]{{ .Content }}{{ $last = .Role }}'
        '{{ end }}{{ end }}{{ if eq $last "user" }} [/INST]{{ end }}'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ loop.index }}. {{ message.content }}{% endfor %}",
        "{{ strftime_now('%d') }}{% for message in messages %}{{ message.content }}\n{% endfor %}",
        "{% for message in messages %}{{ '{{' + message.content }}{% endfor %}",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_does_more_has_none(template: str) -> None:
    assert go_template(tokenizer_with(template)) is None
    assert go_template(Tokenizer.from_metadata(byte_level(), "without one")) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_go_says_what_jinja_says(name: str, tmp_path: Path) -> None:
    """For the first messages of a conversation, after a system message too where the model knows such messages."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go")
    (tmp_path / "run.go").write_text(GO)
    subprocess.run([go, "build", "-o", "run", "run.go"], cwd=tmp_path, check=True)
    tokenizer = tokenizer_with(TEMPLATES[name])
    for system in ([("system", "Be brief.")] if name not in ("mistral", "gemma") else [], []):
        for count in (1, 3, 5):
            messages = [{"role": role, "content": content} for role, content in system + TALK[:count]]
            told = [{"Role": one["role"], "Content": one["content"]} for one in messages]
            case = {"Template": go_template(tokenizer), "System": "".join(c for _, c in system), "Messages": told}
            ran = subprocess.run([tmp_path / "run"], input=json.dumps(case), capture_output=True, text=True, check=True)
            assert ran.stdout == tokenizer.apply_chat_template(messages)
