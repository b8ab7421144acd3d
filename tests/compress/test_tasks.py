"""Tasks of lm-evaluation-harness on an engine give what the model's own probabilities say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mnemos.cli.main import main

QUESTIONS = [
    {"question": "The capital of France is", "options": [" Paris", " Berlin", " Madrid"], "answer": 0},
    {"question": "Two and two is", "options": [" four", " seventeen"], "answer": 0},
    {"question": "The opposite of hot is", "options": [" purple", " cold"], "answer": 1},
    {"question": "Roses are red, violets are", "options": [" blue", " wooden"], "answer": 0},
]


def describe(folder: Path, name: str, **fields: Any) -> None:
    """A task whose documents are in the folder."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


@pytest.mark.slow
def test_choices_texts_and_answers(smollm2: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    describe(
        tmp_path,
        "own_choices",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{options}}",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    describe(
        tmp_path,
        "own_answers",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{options[answer]}}",
        target_delimiter="",
        generation_kwargs={"until": [".", ",", "\n"], "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    describe(
        tmp_path,
        "own_texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )
    names = "own_choices,own_answers,own_texts"
    assert main(["eval", str(smollm2), "--tasks", names, "--task-folder", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["own_choices"]["acc,none"] == 1.0
    assert 0 <= found["own_answers"]["exact_match,none"] <= 1
    assert 1 < found["own_texts"]["byte_perplexity,none"] < 8
    assert main(["eval", str(smollm2), "--tasks", "no_such_task", "--task-folder", str(tmp_path)]) == 2
    assert "tasks has 'no_such_task', which lm-evaluation-harness does not know" in capsys.readouterr().err


def test_without_the_harness_the_message_says_what_to_install(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mnemos.compress.tasks", raising=False)
    assert main(["eval", "smollm2-135m", "--tasks", "arc_easy"]) == 1
    assert "pip install 'mnemos[eval]'" in capsys.readouterr().err
    assert main(["eval", "smollm2-135m", "book.txt", "--tasks", "arc_easy"]) == 2
    assert "--tasks is given with FILE; tasks have their own texts" in capsys.readouterr().err
