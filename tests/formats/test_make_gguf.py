"""The tool that writes GGUF files with random weights: readable, plausible, with a tokenizer."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mnemos.formats.gguf import GGUFFile
from mnemos.formats.tensor_types import TensorType

pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "tools"))
make_gguf = pytest.importorskip("make_gguf")


@pytest.mark.parametrize("type_", [*make_gguf.FLOATS, *make_gguf.SCALES], ids=lambda t: t.name)
def test_weights_of_every_type(tmp_path, type_):
    shape = make_gguf.SHAPES["tiny"]
    make_gguf.write(tmp_path / "m.gguf", shape, type_, 0, None)
    tensors = GGUFFile.open(tmp_path / "m.gguf").tensors
    assert tensors["blk.1.attn_q.weight"].type is type_
    assert tensors["token_embd.weight"].shape == (shape.vocabulary, shape.hidden)
    for tensor in tensors.values():
        values = tensor.dequantize()
        deviation, mean = (tensor.columns**-0.5, 0) if len(tensor.shape) == 2 else (0.1, 1)
        assert abs(values.std() / deviation - 1) < 0.2, tensor.name
        assert abs(values.mean() - mean) < 0.3 * deviation, tensor.name


def test_columns_that_no_k_quant_fits(tmp_path):
    make_gguf.write(tmp_path / "m.gguf", make_gguf.SHAPES["tiny"], TensorType.Q4_K, 0, None)
    assert GGUFFile.open(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"].type is TensorType.Q5_0
    assert make_gguf.fitting(TensorType.Q6_K, 64) is TensorType.Q8_0
    assert make_gguf.fitting(TensorType.Q6_K, 40) is TensorType.F16


def test_a_seed_makes_a_file(tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_gguf.write(tmp_path / name, make_gguf.SHAPES["tiny"], TensorType.Q4_0, seed, None)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_tokenizers(tmp_path):
    shape = make_gguf.SHAPES["tiny"]
    make_gguf.write(tmp_path / "a.gguf", shape, TensorType.Q4_0, 0, None)
    own = GGUFFile.open(tmp_path / "a.gguf").metadata
    tokens = own["tokenizer.ggml.tokens"].strings()
    assert len(set(tokens)) == shape.vocabulary and tokens[-1] == "<|end|>"
    assert len(own["tokenizer.ggml.merges"]) == shape.vocabulary - 256 - 2

    larger = make_gguf.Shape(**{**vars(shape), "vocabulary": 600})
    make_gguf.write(tmp_path / "b.gguf", larger, TensorType.Q4_0, 0, tmp_path / "a.gguf")
    copied = GGUFFile.open(tmp_path / "b.gguf").metadata
    assert copied["tokenizer.ggml.tokens"].strings() == [*tokens, *(f"[PAD{i}]" for i in range(512, 600))]
    assert copied["tokenizer.ggml.merges"].strings() == own["tokenizer.ggml.merges"].strings()
    expected = [*own["tokenizer.ggml.token_type"], *[5] * 88]
    assert np.array_equal(copied["tokenizer.ggml.token_type"], expected)
    assert copied["tokenizer.ggml.eos_token_id"] == own["tokenizer.ggml.eos_token_id"]
    with pytest.raises(SystemExit, match="has 600 tokens, more than the shape's 512"):
        make_gguf.write(tmp_path / "c.gguf", shape, TensorType.Q4_0, 0, tmp_path / "b.gguf")
