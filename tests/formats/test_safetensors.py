"""Safetensors files and sharded folders: equal to the library's reading, and a clear refusal of every bad one."""

import json
import struct

import numpy as np
import pytest

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.safetensors import open_safetensors, open_safetensors_folder
from mnemos.formats.tensor_types import TensorType
from tests.formats.small_files import safetensors, small_safetensors


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="model.safetensors"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return tmp_path / name

    return write_file


def test_types_shapes_and_values(write):
    tensors = open_safetensors(write(small_safetensors()))
    assert [(t.name, t.type, t.shape) for t in tensors.values()] == [
        ("w", TensorType.F32, (2, 3)),
        ("h", TensorType.BF16, (4,)),
        ("mask", TensorType.U8, (1, 2)),
        ("none", TensorType.F16, (0, 5)),
    ]
    assert tensors["w"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["h"].dequantize().tolist() == [1, 1, 1, 1]
    assert tensors["mask"].dequantize().tolist() == [[1, 0]]
    assert tensors["none"].dequantize().shape == (0, 5)


def test_reads_what_the_library_writes(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)
    values = {
        str(dtype): (torch.randn(3, 5, generator=generator) * 50).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16)
    }
    values |= {"bool": torch.tensor([True, False]), "scalar": torch.tensor(3.5), "int64": torch.arange(4)}
    library.save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = open_safetensors(tmp_path / "model.safetensors")
    assert set(ours) == set(values)
    for name, value in values.items():
        assert ours[name].shape == tuple(value.shape)
        assert np.array_equal(ours[name].dequantize(), value.float().numpy())


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(data=bytes(4), **fields):
    return safetensors({"a": entry(**fields)}, data)


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD = {
    "empty": (b"", "empty"),
    "short": (b"abc", "has 3 bytes"),
    "header length": (safetensors({}, b"", length=3), "header length is 3"),
    "header length huge": (safetensors({}, b"", length=2**64 - 1), f"header length is {2**64 - 1}"),
    "no JSON": (safetensors(b"{]", b""), "header: is not valid JSON"),
    "no UTF-8": (safetensors(b'{"\xff":1}', b""), "header: is not valid JSON"),
    "no object": (safetensors([], b""), r"holds \[\]; a JSON object"),
    "deep": (safetensors(DEEP, b""), "nested too deeply"),
    "rather deep": (safetensors(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b""), "nested too deeply; 64"),
    "long number": (safetensors(b'{"a":' + b"9" * 10_000 + b"}", b""), "is not valid JSON"),
    "twice": (safetensors(b'{"a":1,"a":1}', b""), "key 'a' appears twice"),
    "notes": (safetensors({"__metadata__": {"a": 1}}, b""), "__metadata__ is"),
    "no entry": (safetensors({"a": 5}, b""), "'a' is described by 5"),
    "field missing": (safetensors({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets are needed"),
    "field unknown": (safetensors({"a": entry() | {"x": 1}}, bytes(4)), "is described by"),
    "shape text": (safetensors({"a": entry() | {"shape": "1"}}, bytes(4)), "has shape '1'"),
    "shape negative": (one(shape=(-1,)), r"has shape \[-1\]"),
    "shape boolean": (one(shape=(True,)), r"has shape \[True\]"),
    "shape fraction": (one(shape=(1.0,)), r"has shape \[1.0\]"),
    "shape NaN": (safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "has shape"),
    "shape huge": (one(shape=(2**70,)), "has shape"),
    "shape overflow": (one(shape=(2**33, 2**33)), "bytes as F32, but data_offsets"),
    "empty and huge": (one(b"", shape=(2**61, 2**61, 0), offsets=(0, 0)), "bytes as F32, but data_offsets"),
    "many axes": (one(shape=(1,) * 40), "has shape"),
    "shape and bytes": (one(shape=(2,)), r"has shape \[2\], 8 bytes as F32, but data_offsets \[0, 4\]"),
    "offsets backwards": (one(offsets=(4, 0)), r"has data_offsets \[4, 0\]"),
    "offsets three": (one(offsets=(0, 4, 4)), "has data_offsets"),
    "after the end": (one(bytes(3)), "the header describes 4 bytes of tensors, the file holds 3"),
    "bytes left over": (one(bytes(5)), "the header describes 4 bytes of tensors, the file holds 5"),
    "hole": (one(bytes(8), offsets=(4, 8)), "leaves a hole after 0"),
    "overlap": (safetensors({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "'b' .* overlaps"),
    "same place": (safetensors({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(write, name):
    content, message = BAD[name]
    path = write(content)
    with pytest.raises(FormatError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64", 7])
def test_unsupported_types_are_named(write, dtype):
    with pytest.raises(UnsupportedError, match=f"tensor 'a' has dtype .*{dtype}.*supported are F32, F16"):
        open_safetensors(write(one(dtype=dtype)))


def test_every_truncation_is_refused(write):
    content = small_safetensors()
    for size in range(len(content)):
        with pytest.raises(FormatError):
            open_safetensors(write(content[:size]))


def test_shards(write, tmp_path):
    write(safetensors({"a": entry(), "unused": entry(offsets=(4, 8))}, struct.pack("<2f", 1, 0)), "x-1.safetensors")
    write(safetensors({"b": entry()}, struct.pack("<f", 2)), "x-2.safetensors")
    write(
        {"metadata": {}, "weight_map": {"b": "x-2.safetensors", "a": "x-1.safetensors"}}, "model.safetensors.index.json"
    )
    tensors = open_safetensors_folder(tmp_path)
    assert {name: tensor.dequantize().tolist() for name, tensor in tensors.items()} == {"b": [2], "a": [1]}


def test_shards_as_the_hub_caches_them(write, tmp_path):
    """Its snapshots are links into another folder."""
    write(one(), "blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    try:
        (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    assert list(open_safetensors_folder(folder)) == ["a"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is None"),
        ({"weight_map": []}, r"weight_map is \[\]"),
        ({"weight_map": {}}, "weight_map is {}"),
        ({"weight_map": {"a": 1}}, "tensor 'a' is in 1; the plain name"),
        ({"weight_map": {"a": "no.safetensors"}}, "no.safetensors: does not exist"),
        ({"weight_map": {"b": "model.safetensors"}}, "'b' should be in model.safetensors, which does not hold it"),
        (b"\xef\xbb\xbf{", "not valid JSON"),
    ],
)
def test_bad_indices_are_refused(write, tmp_path, index, message):
    write(one())
    write(index, "model.safetensors.index.json")
    with pytest.raises(FormatError, match=message):
        open_safetensors_folder(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../up.safetensors", "/etc/up.safetensors", "sub/up.safetensors", "sub\\up.safetensors", "C:up.safetensors",
     "..", "", "pytorch_model.bin", "a\0.safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_reaches_nothing_outside_of_its_folder(write, tmp_path, file):
    write(one(), "up.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(FormatError, match="the plain name of a .safetensors file in the same folder"):
        open_safetensors_folder(folder)
