"""llama.cpp's importance matrices, in both forms."""

import struct

import numpy as np
import pytest

from mnemos.errors import FormatError
from mnemos.formats.gguf_writer import writing_gguf
from mnemos.formats.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from mnemos.formats.tensor_types import TensorType

VALUES = {
    "blk.0.attn_q.weight": np.array([0.5, 0, 2], np.float32),
    "blk.0.ffn_down_exps.weight": np.array([[1, 2], [3, 4]], np.float32),
}


def legacy(entries, tail=b""):
    data = struct.pack("<i", len(entries))
    for name, calls, numbers in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(numbers))
        data += np.asarray(numbers, "<f4").tobytes()
    return data + tail


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, ImportanceMatrix(VALUES, "text.txt", 3))
    read = read_imatrix(path)
    assert read.source == "text.txt" and read.chunks == 3
    assert {name: v.tolist() for name, v in read.values.items()} == {name: v.tolist() for name, v in VALUES.items()}


def test_sums_are_divided_by_their_counts_and_unvisited_experts_get_ones(tmp_path):
    path = tmp_path / "imatrix.gguf"
    tensors = {
        "w.in_sum2": np.array([[8, 4], [0, 0]], np.float32),
        "w.counts": np.array([[4], [0]], np.float32),
    }
    with writing_gguf(path, {"general.type": "imatrix"}, [(n, a.shape) for n, a in tensors.items()]) as writer:
        for name, array in tensors.items():
            writer.write(name, TensorType.F32, [array.view(np.uint8)])
    assert read_imatrix(path).values["w"].tolist() == [[2, 1], [1, 1]]


def test_the_older_form(tmp_path):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([("w", 4, [8, 4]), ("v", 0, [3])]))
    assert {name: v.tolist() for name, v in read_imatrix(path).values.items()} == {"w": [2, 1], "v": [3]}
    path.write_bytes(legacy([("w", 1, [1])], struct.pack("<ii", 12, 4) + b"text"))
    read = read_imatrix(path)
    assert (read.source, read.chunks) == ("text", 12)


@pytest.mark.parametrize(
    "content, problem",
    [
        (legacy([("w", 1, [1, 2])])[:-3], "values of w needs 8 bytes at .* where 5 are left"),
        (legacy([("w", 1, [1, np.nan])]), "importance of 'w' has infinite, NaN or negative values"),
        (legacy([("w", 1, [-1])]), "importance of 'w' has infinite, NaN or negative values"),
        (b"This is not an importance matrix", "name of entry 0 has .* bytes"),
        (struct.pack("<ii", 1, -5), "name of entry 0 has -5 bytes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, problem):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=problem):
        read_imatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path):
    path = tmp_path / "model.gguf"
    with writing_gguf(path, {"general.type": "model"}, []):
        pass
    with pytest.raises(FormatError, match="general.type is 'model'"):
        read_imatrix(path)


def test_sums_without_counts_are_refused(tmp_path):
    path = tmp_path / "imatrix.gguf"
    with writing_gguf(path, {"general.type": "imatrix"}, [("w.in_sum2", (2,))]) as writer:
        writer.write("w.in_sum2", TensorType.F32, [np.ones(2, np.float32).view(np.uint8)])
    with pytest.raises(FormatError, match=r"'w.counts' must have one count for each row of 'w.in_sum2'"):
        read_imatrix(path)
