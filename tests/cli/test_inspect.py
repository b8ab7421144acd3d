"""`mnemos inspect` on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnemos.cli.main import main


def inspect(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_all_facts_as_json(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(inspect([str(smollm2), "--json", "--context", "1000"], capsys))
    expected = {
        "architecture": "llama",
        "licence": "apache-2.0",
        "parameters": 134_515_008,
        "vocabulary": 49_152,
        "layers": 30,
        "context_length": 8192,
        "context": 1000,
        "tokenizer": "gpt2 (smollm)",
        "chat_template": True,
        "cache_dtype": "float16",
    }
    assert {name: report[name] for name in expected} == expected
    assert report["cache_bytes"] == 1024 * 2 * 30 * 3 * 64 * 2  # whole pages of 32 tokens
    assert {name: share["tensors"] for name, share in report["types"].items()} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert sum(share["bytes"] for share in report["types"].values()) == report["weight_bytes"]


def test_the_same_for_people(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect([str(smollm2)], capsys)
    for words in ("apache-2.0", "135M (134,515,008)", "8,192 tokens", "with chat template", "Q4_1", "5 bits each"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) < 120


def test_layers_with_a_window_take_less_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.models.checkpoints import CONFIGS, build

    config = CONFIGS["gemma3"]()
    config.sliding_window, config.max_position_embeddings = 40, 1024
    build(config, tmp_path)
    report = json.loads(inspect([str(tmp_path), "--json"], capsys))
    assert report["windows"] == {"40": 5}
    a_layers_page = 32 * 2 * config.num_key_value_heads * config.head_dim * 2
    assert report["cache_bytes"] == (1024 // 32 + 5 * (2 + 3)) * a_layers_page
    assert "5 of 6 layers reach back 40 tokens" in inspect([str(tmp_path)], capsys)


def test_an_architecture_that_is_not_built_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {f"setting_{number}": number for number in range(30)}
    config = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 8, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = json.dumps({"model.embed.weight": {"dtype": "F16", "shape": [6, 8], "data_offsets": [0, 96]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(96))
    report = json.loads(inspect([str(tmp_path), "--json"], capsys))
    assert (report["architecture"], report["parameters"], report["weight_bytes"]) == ("OPTForCausalLM", 48, 96)
    assert report["config"] == {"model_type": "opt", "hidden_size": 8, **settings}
    assert report["types"] == {"F16": {"tensors": 1, "values": 48, "bytes": 96}}
    text = inspect([str(tmp_path)], capsys)
    for words in ("OPTForCausalLM", "transformers", "hidden_size 8", "setting_29 29", "48 (48)"):
        assert words in text
    assert max(len(line) for line in text.splitlines()) < 120 + len(str(tmp_path))


def test_what_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("this is not a model at all, only text")
    assert main(["inspect", str(file)]) == 1
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


@pytest.mark.parametrize("options", [["--context", "0"], ["--context", "-5"], ["--kv-dtype", "int7"]])
def test_impossible_wishes_are_refused(smollm2: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(smollm2), *options]) == 2
    assert capsys.readouterr().err.startswith("mnemos: error: ")


def test_the_machine_and_the_levels_that_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(inspect(["--machine", "--json"], capsys))
    assert facts["cores"] >= 1 and set(facts["levels"]) == {"quantized", "floats", "attention"}
    text = inspect(["--machine"], capsys)
    assert all(f"{operators:<12}{level}" in text for operators, level in facts["levels"].items())


@pytest.mark.parametrize("arguments", [[], ["model.gguf", "--machine"]])
def test_a_model_or_the_machine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) != 0
    assert "a model or --machine" in capsys.readouterr().err
