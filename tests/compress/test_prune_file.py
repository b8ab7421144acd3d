"""Neurons and heads removed from GGUF files, and the commands that prune and distill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from gguf import GGMLQuantizationType  # noqa: E402

from mnemos.compress import prune_file as module  # noqa: E402
from mnemos.compress.prune_file import prune_file  # noqa: E402
from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import ConfigError, UnsupportedError  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.formats.tensor_types import TensorType  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.models.checkpoints import CONFIGS, token_ids  # noqa: E402
from tests.models.gguf_files import write_gguf  # noqa: E402

TEXT = token_ids(600, seed=3)


def written(name: str, path: Path, quantization: GGMLQuantizationType | None = None) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    write_gguf(model, path, quantization)
    return model


def logits(path: Path) -> np.ndarray:
    with InferenceEngine(load_model(open_checkpoint(path), dtype="float32")) as engine:
        return np.array(engine.logits(TEXT[:48]))


@pytest.fixture(autouse=True)
def ids_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have no tokenizer: a text stands for token ids."""
    real = module.moments
    monkeypatch.setattr(module, "moments", lambda source, text, **options: real(source, TEXT, **options))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_file_is_smaller_and_says_nearly_the_same(name: str, tmp_path: Path) -> None:
    written(name, tmp_path / "base.gguf")
    heads = 0.5 if name != "gpt2" else 0.0
    done = prune_file(tmp_path / "base.gguf", tmp_path / "small.gguf", "", neurons=0.5, heads=heads)
    before, after = (open_checkpoint(tmp_path / f"{one}.gguf") for one in ("base", "small"))
    size = [sum(tensor.size for tensor in one.tensors.values()) for one in (before, after)]
    assert size[1] < 0.8 * size[0] and {one.kind for one in done} == {"neurons", "heads"} - (
        {"heads"} if not heads else set()
    )
    full, small = logits(tmp_path / "base.gguf"), logits(tmp_path / "small.gguf")
    assert np.square(full - small).mean() < 0.3 * full.var()
    assert after.tensors["blk.1.ffn_down.weight"].shape[1] == done[0].after == done[0].before // 2


def test_what_stays_is_copied_and_what_is_fitted_is_stored_once(tmp_path: Path) -> None:
    written("llama", tmp_path / "base.gguf", GGMLQuantizationType.Q4_0)
    before = open_checkpoint(tmp_path / "base.gguf").tensors
    (done, *_) = prune_file(tmp_path / "base.gguf", tmp_path / "small.gguf", "", neurons=0.25)
    after = open_checkpoint(tmp_path / "small.gguf").tensors
    assert done.before == 88 and after["blk.0.ffn_up.weight"].shape == (66, 64)
    rows = {bytes(row) for row in before["blk.0.ffn_up.weight"].row_matrix()}
    assert {bytes(row) for row in after["blk.0.ffn_up.weight"].row_matrix()} <= rows
    assert np.array_equal(before["blk.0.attn_q.weight"].data, after["blk.0.attn_q.weight"].data)
    down = after["blk.0.ffn_down.weight"]
    assert down.type in (TensorType.F16, TensorType.F32)  # 66 columns are no whole blocks


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {}, "neurons and heads are 0"),
        ("llama", {"neurons": 1.0}, "neurons is 1.0; it must be a number from 0 and below 1"),
        ("mixtral", {"neurons": 0.5}, "has no neurons that can be removed"),
        ("llama-tied", {"heads": 0.5}, "has no heads that can be removed"),
    ],
)
def test_bad_input_is_named(name: str, options: dict[str, float], message: str, tmp_path: Path) -> None:
    written(name, tmp_path / "base.gguf")
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        prune_file(tmp_path / "base.gguf", tmp_path / "out.gguf", "", **options)
    assert not (tmp_path / "out.gguf").exists()
    if options:
        with pytest.raises(ConfigError, match="the model itself"):
            prune_file(tmp_path / "base.gguf", tmp_path / "base.gguf", "", neurons=0.5)
