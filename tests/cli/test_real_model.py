"""The commands on the real model, from the shell and in this process."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnemos import InferenceEngine
from mnemos.bench import scheduling
from mnemos.cli.main import main

TEXT = "Paris is the capital of France. The river Seine runs through it, and many bridges cross the river.\n"


def test_a_process_continues_a_text(smollm2: Path) -> None:
    command = [sys.executable, "-m", "mnemos", "generate", str(smollm2), "The capital of France is"]
    done = subprocess.run([*command, "--raw", "--max-new-tokens=6"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(" Paris")
    assert "6 tokens" in done.stderr


def test_generate_as_json_has_tokens_and_usage(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--max-new-tokens", "5", "--ignore-eos", "--logprobs", "2", "--num-return-sequences", "2"]
    assert main(["generate", str(smollm2), "Say yes.", *options, "--temperature", "0.7", "--seed", "3"]) == 0
    completion = json.loads(capsys.readouterr().out)
    assert completion["usage"]["completion_tokens"] == 10
    for choice in completion["choices"]:
        assert len(choice["token_ids"]) == len(choice["logprobs"]) == 5
        assert all(len(top) == 2 for top in choice["top_logprobs"])


def test_a_draft_model_changes_no_text(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(smollm2), "The capital of France is", "--raw", "--max-new-tokens", "12", "--quiet"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--draft", str(smollm2), "--draft-tokens", "3"]) == 0
    assert capsys.readouterr().out == plain


def test_eval_is_the_mean_over_chunks(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert main(["eval", str(smollm2), str(file), "--chunk", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    with InferenceEngine.from_pretrained(smollm2) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(TEXT, add_special=False)
        losses = []
        for start in range(0, len(ids), 8):
            chunk = ids[start : start + 8]
            logits = engine.logits(chunk).astype(np.float64)
            normalised = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            losses += [-normalised[i, token] for i, token in enumerate(chunk[1:])]
    assert figures["tokens"] == len(losses) == len(ids) - -(-len(ids) // 8)
    assert figures["negative_log_likelihood"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["negative_log_likelihood"]))


def test_embed_prints_a_vector_for_each_text(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with InferenceEngine.from_pretrained(smollm2) as engine:
        expected = engine.embed(["Hello there", "Bye"], pooling="last")
    assert main(["embed", str(smollm2), "Hello there", "Bye", "--pooling", "last"]) == 0
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines()] == [
        pytest.approx(vector.tolist(), rel=1e-6) for vector in expected
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there\n\nBye\n"))
    assert main(["embed", str(smollm2), "--pooling", "last"]) == 0
    assert capsys.readouterr().out == printed
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["embed", str(smollm2)]) == 2
    assert "there are no texts" in capsys.readouterr().err


def test_eval_keeps_to_a_short_context(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    assert main(["eval", str(smollm2), str(file), "--context", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chunk"] == 64


@pytest.mark.slow
def test_eval_against_another_model(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "text.txt", tmp_path / "loss.svg"
    file.write_text(TEXT)
    command = ["eval", str(smollm2), "--against", str(smollm2), "--text", str(file), "--picture", str(picture)]
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["kl_mean"] < 0.02  # activations are rounded to 8 bits, in float32 they are not
    assert figures["kl_mean"] <= figures["kl_99"]
    assert figures["top1_agreement"] > 0.8
    assert figures["tensor_bytes"] == figures["against_tensor_bytes"] > 90e6
    assert figures["tokens_per_second"] > 0
    assert picture.read_text().startswith("<svg")
    assert main([*command, "--dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "divergence            0.000000 nats per token" in table and "same most probable    100.00%" in table


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"text", ["--text", "other.txt"], "2 text files are given; expected one"),
        (b"text", ["--picture", "loss.svg"], "--picture is given without --against"),
        (b"text", ["--chunk", "1"], "--chunk is 1; it must be from 2"),
        (b"text", ["--chunk", "100000"], "--chunk is 100000"),
        (b"", [], "at least 2 are needed"),
        (b"\xff\xfe text", [], "is not UTF-8 text: invalid start byte at byte 0"),
    ],
)
def test_eval_refuses_what_it_cannot_score(
    content: bytes,
    options: list[str],
    words: str,
    smollm2: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert main(["eval", str(smollm2), str(file), *options]) in (1, 2)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_bench_prints_json_lines(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(smollm2), "--metrics", "pp16,tg4,b2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["metric"] for line in lines] == ["pp16", "tg4", "b2"]
    assert all(line["engine"] == "mnemos" and line["unit"] == "tokens/s" and line["value"] > 0 for line in lines)


def test_bench_as_a_table_says_what_bounds_it(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(smollm2), "--metrics", "tg4"]) == 0
    shown = capsys.readouterr().out
    assert "cores" in shown and "GB/s" in shown and "% of what memory bandwidth allows" in shown


@pytest.mark.slow
def test_serving_serves_every_request(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RUNS": 1, "STEPS": 8, "LONG_PROMPT": 200, "DISTURBED": 32}.items():
        monkeypatch.setattr(scheduling, name, value)
    options = ["--requests", "3", "--rate", "100", "--seed", "5", "--json"]
    assert main(["bench", str(smollm2), "--serving", *options]) == 0
    metrics = [json.loads(line)["metric"] for line in capsys.readouterr().out.splitlines()]
    served = ["requests", "output", "ttft_p50", "ttft_p90", "ttft_p99", "itl_p50", "itl_p90", "itl_p99", "overhead"]
    ratios = ["concurrent32", "stall", "beams4", "lookup_loop", "lookup_other", "overhead1", "overhead32"]
    assert metrics == served + ratios


@pytest.mark.parametrize(
    "options",
    [
        ["--metrics", "warm"],
        ["--metrics", "pp9999"],
        ["--serving", "--requests", "0"],
        ["--ops", "--serving"],
        ["--ops", "--metrics", "pp8"],
    ],
)
def test_bench_refuses_what_it_cannot_measure(
    options: list[str], smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(smollm2), *options]) == 2
    assert capsys.readouterr().err.startswith("mnemos: error: ")
