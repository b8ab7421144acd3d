"""Opening a model from any kind of files."""

import json
import os

import pytest

from mnemos.errors import FormatError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.strict_json import MAX_BYTES
from tests.formats.small_files import SmallGGUF, small_safetensors


def huggingface(folder, config='{"model_type": "llama"}'):
    (folder / "model.safetensors").write_bytes(small_safetensors())
    (folder / "config.json").write_text(config)
    return folder


def test_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(SmallGGUF().build())
    for source in (path, str(path), tmp_path):
        checkpoint = open_checkpoint(source)
        assert (checkpoint.kind, checkpoint.path, checkpoint.folder) == ("gguf", path, tmp_path)
        assert checkpoint.metadata["general.architecture"] == "llama"
        assert list(checkpoint.tensors) == ["a", "b"]


def test_gguf_under_any_name(tmp_path):
    (tmp_path / "blob").write_bytes(SmallGGUF().build())
    assert open_checkpoint(tmp_path / "blob").kind == "gguf"


def test_a_folder_with_one_gguf_in_parts(tmp_path):
    for part in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (tmp_path / part).write_bytes(SmallGGUF().build())
    assert open_checkpoint(tmp_path).path.name == "m-00001-of-00002.gguf"


def test_huggingface_folder(tmp_path):
    checkpoint = open_checkpoint(huggingface(tmp_path))
    assert (checkpoint.kind, checkpoint.path, checkpoint.folder) == ("huggingface", tmp_path, tmp_path)
    assert checkpoint.metadata == {"model_type": "llama"}
    assert checkpoint.generation_config == {}
    assert checkpoint.tensors["w"].shape == (2, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def test_safetensors_file_beside_its_config(tmp_path):
    (huggingface(tmp_path) / "model.safetensors").rename(tmp_path / "other.safetensors")
    checkpoint = open_checkpoint(tmp_path / "other.safetensors")
    assert (checkpoint.kind, checkpoint.folder) == ("huggingface", tmp_path)


def test_close_lets_go_but_leaves_views_valid(tmp_path):
    (tmp_path / "model.gguf").write_bytes(SmallGGUF().build())
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    tensor = checkpoint.tensors["b"]
    checkpoint.close()
    assert checkpoint.tensors == {} and tensor.dequantize().tolist() == [1, 2, 3]


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="nowhere: does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="is an empty folder; a .gguf file, or a folder with config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"holds no model but notes.txt; a .gguf file"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="notes.txt: "):
        open_checkpoint(tmp_path / "notes.txt")


def test_several_gguf_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(FormatError, match=r"holds 2 GGUF models \(a.gguf, b.gguf\); name one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_run(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(FormatError, match=f"{name}: is a PyTorch pickle.*save the model as safetensors"):
        open_checkpoint(tmp_path)
    pytest.importorskip("torch")  # whose restricted reader reads a file that is named
    with pytest.raises(FormatError, match=f"{name}: cannot be read as"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json: does not exist"),
        ("", "config.json: is not valid JSON"),
        ("[1]", r"config.json: holds \[1\]; a JSON object is needed"),
        ("[" * 1_000_000, "config.json: is nested too deeply"),
        ('{"a":' * 300 + "1" + "}" * 300, "config.json: is nested too deeply"),
        ('{"a": 1' + "0" * 10_000 + "}", "config.json: is not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
    ],
)
def test_bad_configs_are_refused(tmp_path, config, message):
    huggingface(tmp_path, config or "")
    if config is None:
        (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path)


def test_a_config_may_hold_infinity(tmp_path):
    """Hugging Face writes such configs; the fields' readers judge the values."""
    config = open_checkpoint(huggingface(tmp_path, '{"a": [0.0, Infinity], "b": NaN}')).metadata
    assert config["a"] == [0.0, float("inf")] and config["b"] != config["b"]


def test_a_huge_config_is_not_even_read(tmp_path):
    with (huggingface(tmp_path) / "config.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FormatError, match=f"has {MAX_BYTES + 1} bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint(tmp_path / "model.gguf")
    huggingface(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FormatError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_config_round_trip(tmp_path):
    config = {"hidden_size": 8, "rope_scaling": {"factor": 2.0}, "architectures": ["X"], "name": "ä"}
    assert open_checkpoint(huggingface(tmp_path, json.dumps(config))).metadata == config
