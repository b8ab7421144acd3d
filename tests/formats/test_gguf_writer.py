"""Files written here are read back as they were, by our reader and by the gguf package."""

import os

import numpy as np
import pytest

from mnemos.errors import ConfigError
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import RawValue, encode_value, writing_gguf
from mnemos.formats.tensor_types import TensorType
from tests.formats.small_files import SmallGGUF

VALUES = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.count": 7,
    "a.negative": -7,
    "a.large": 2**40,
    "a.real": 0.5,
    "a.double": np.float64(1 / 3),
    "a.bytes": np.array([1, 255], np.uint8),
    "a.flags": [True, False],
    "a.integers": [1, -2, 3],
    "a.reals": [0.5, 1.5],
    "a.strings": ["ä", "", "x" * 300],
    "a.none": np.zeros(0, np.float32),
}
TENSORS = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.ones(5, np.float32)}


def write(path, values=VALUES, tensors=TENSORS):
    with writing_gguf(path, values, [(name, array.shape) for name, array in tensors.items()]) as writer:
        for name, array in tensors.items():
            rows = array.reshape(-1, array.shape[-1]).view(np.uint8)
            writer.write(name, TensorType.F32, (rows[i : i + 1] for i in range(len(rows))))


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    file = GGUFFile.open(path)
    assert {name: tensor.dequantize().tolist() for name, tensor in file.tensors.items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    assert list(file.metadata) == list(VALUES)
    for key, value in VALUES.items():
        read = file.metadata[key]
        same = list(read) == list(value) if hasattr(value, "__len__") and not isinstance(value, str) else read == value
        assert same, key
    assert file.metadata["a.integers"].dtype == "<i4" and file.metadata["a.reals"].dtype == "<f4"


def test_the_gguf_package_reads_the_same(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write(path)
    reader = gguf.GGUFReader(path)
    assert {t.name: t.data.reshape(-1).tolist() for t in reader.tensors} == {
        name: array.reshape(-1).tolist() for name, array in TENSORS.items()
    }
    types = {key: [t.name for t in field.types] for key, field in reader.fields.items()}
    assert types["a.count"] == ["UINT32"] and types["a.negative"] == ["INT32"] and types["a.large"] == ["INT64"]
    assert types["a.real"] == ["FLOAT32"] and types["a.double"] == ["FLOAT64"] and types["a.bool"] == ["BOOL"]
    assert types["a.strings"] == ["ARRAY", "STRING"] and types["a.integers"] == ["ARRAY", "INT32"]


def test_stored_values_are_copied_byte_for_byte(tmp_path):
    source, copy = tmp_path / "source.gguf", tmp_path / "copy.gguf"
    source.write_bytes(SmallGGUF().build())
    stored = GGUFFile.open(source).stored_metadata
    write(copy, {key: RawValue(bytes(value)) for key, value in stored.items()})
    assert {k: bytes(v) for k, v in GGUFFile.open(copy).stored_metadata.items()} == {
        k: bytes(v) for k, v in stored.items()
    }


def test_a_tensor_whose_pieces_failed_can_be_written_again(tmp_path):
    path = tmp_path / "model.gguf"

    def failing():
        yield np.zeros(64, np.uint8)
        raise ArithmeticError

    with writing_gguf(path, {}, [("a", (2, 32)), ("b", (3,))]) as writer:
        with pytest.raises(ArithmeticError):
            writer.write("a", TensorType.F32, failing())
        writer.write("a", TensorType.Q8_0, [np.full(68, 7, np.uint8)])
        writer.write("b", TensorType.F32, [np.array([1, 2, 3], np.float32).view(np.uint8)])
    file = GGUFFile.open(path)
    assert file.tensors["a"].type is TensorType.Q8_0 and set(file.tensors["a"].data) == {7}
    assert file.tensors["b"].dequantize().tolist() == [1, 2, 3]


@pytest.mark.parametrize("alignment", [64, RawValue(encode_value("", 64))])
def test_the_alignment_is_kept(tmp_path, alignment):
    path = tmp_path / "model.gguf"
    write(path, {"general.alignment": alignment})
    assert GGUFFile.open(path).alignment == 64


@pytest.mark.parametrize(
    "misuse, problem",
    [
        (lambda w: w.write("b", TensorType.F32, []), "'b' is written where 'a' was announced"),
        (lambda w: w.write("a", TensorType.F32, [np.zeros(3, np.uint8)]), "'a' got 3 bytes; .* needs 8"),
        (lambda w: None, "'a' was announced and not written"),
    ],
)
def test_a_file_that_would_be_wrong_is_not_left(tmp_path, misuse, problem):
    path, tensors = tmp_path / "model.gguf", [("a", (2,)), ("b", (2,))]
    with pytest.raises(ConfigError, match=problem), writing_gguf(path, {}, tensors) as writer:
        misuse(writer)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [None, {"a": 1}, [[1]], [], 1j, b"bytes", ["a", 1]])
def test_values_that_gguf_does_not_have_are_refused(value):
    with pytest.raises(ConfigError, match="metadata 'some.key' is"):
        encode_value("some.key", value)


def test_shapes_that_gguf_does_not_have_are_refused(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"tensor 'a' has shape \(0, 3\)"),
        writing_gguf(tmp_path / "model.gguf", {}, [("a", (0, 3))]),
    ):
        pass
