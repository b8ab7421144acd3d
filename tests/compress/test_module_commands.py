"""`mnemos prune` and `mnemos distill` on a folder: what is written runs, is smaller, and is never half a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from safetensors import SafetensorError  # noqa: E402

from mnemos.cli.main import main  # noqa: E402
from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402

LINES = [f"{a} and {b} make {a + b}, and {b} from {a + b} leaves {a}." for a in range(30) for b in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer, and a text in its words."""
    path = tmp_path_factory.mktemp("model")
    (path.parent / "text.txt").write_text("\n".join(LINES))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LINES, vocab_size=300, show_progress=False)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    shared: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(vocab_size=300, max_position_embeddings=256, **shared, **heads)
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


def size(path: Path) -> int:
    return sum(tensor.size for tensor in open_checkpoint(path).tensors.values())


def test_a_folder_is_pruned_and_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = str(folder.parent / "text.txt"), tmp_path / "small"
    options = ["--neurons", "0.5", "--heads", "0.5", "--layers", "1", "--calibrate", text, "--text", text]
    assert main(["prune", str(folder), *options, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers, layers" in shown and "3 -> 2" in shown and "same most probable" in shown
    assert size(out) < 0.8 * size(folder)
    with InferenceEngine.from_pretrained(out) as engine:
        assert engine.spec.layers == 2 and isinstance(engine.generate("3 and 4", max_new_tokens=3), str)
    assert main(["prune", str(folder), *options, "--out", str(out)]) == 2
    assert "which exists; give a new name" in capsys.readouterr().err


def test_zeros_are_written_too(folder: Path, tmp_path: Path) -> None:
    text, out = str(folder.parent / "text.txt"), tmp_path / "zeros"
    assert (
        main(["prune", str(folder), "--zeros", "0.5", "--pattern", "2:4", "--calibrate", text, "--out", str(out)]) == 0
    )
    weight = open_checkpoint(out).tensors["model.layers.1.mlp.up_proj.weight"].dequantize()
    assert ((weight.reshape(64, 8, 4) != 0).sum(-1) == 2).all()


def test_a_student_is_trained_and_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = str(folder.parent / "text.txt"), tmp_path / "student"
    options = ["--text", text, "--out", str(out), "--width", "0.5", "--steps", "3", "--alone"]
    assert main(["distill", str(folder), *options, "--checkpoints", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == ["teacher", "student before", "student", "student alone"]
    assert (tmp_path / "run" / "step-00000003").is_dir() and size(out) < size(folder)
    with InferenceEngine.from_pretrained(out) as engine:
        assert isinstance(engine.generate("3 and 4", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is to be removed; give --neurons, --heads, --layers or --zeros"),
        (["--zeros", "0.5", "--layers", "1"], "--zeros is given with what removes parts"),
        (["--layers", "3"], "has 3 layers, of which 3 cannot go"),
        (["--neurons", "1.5"], "neurons is 1.5; it must be a number from 0 and below 1"),
        (["--zeros", "0.3", "--pattern", "2:4"], "pattern 2:4 makes 0.5 of the weights zero; give --zeros 0.5"),
        (["--neurons", "0.5", "--calibrate", "short.txt"], "tokens; at least 256 are needed"),
    ],
)
def test_bad_input_is_named(
    options: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    options = [str(tmp_path / "short.txt") if one == "short.txt" else one for one in options]
    text = str(folder.parent / "text.txt")
    assert main(["prune", str(folder), "--calibrate", text, "--out", str(tmp_path / "out"), *options]) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_student_with_other_tokens_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    shutil.copytree(folder, student)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([line[::-1].upper() for line in LINES], vocab_size=300, show_progress=False)
    tokenizer.save(str(student / "tokenizer.json"))
    options = ["--text", str(folder.parent / "text.txt"), "--student", str(student), "--out", str(tmp_path / "out")]
    assert main(["distill", str(folder), *options]) == 2
    assert "in the other; expected the same vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    options = ["--neurons", "0.5", "--calibrate", str(folder.parent / "text.txt"), "--out", str(tmp_path / "small")]
    assert main(["prune", str(folder), *options]) == 1
    assert "small: cannot be written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_size_that_nothing_comes_down_to_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mnemos._native")
    options = ["--size", "10KB", "--calibrate", str(folder.parent / "text.txt"), "--out", str(tmp_path / "a.gguf")]
    assert main(["quantize", str(folder), *options]) == 2
    shown = capsys.readouterr().err
    assert "--size is 10KB; the smallest file of this model has" in shown and "calibrating" not in shown
