"""GGUF files: the content of a good one, and a clear refusal of every bad one."""

import struct

import numpy as np
import pytest

from mnemos.errors import FormatError, UnsupportedError
from mnemos.formats.gguf import MAX_TEXT, GGUFFile
from mnemos.formats.tensor_types import TensorType
from tests.formats.small_files import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, U64, SmallGGUF, info, pair, string


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="model.gguf"):
        (tmp_path / name).write_bytes(content.build() if isinstance(content, SmallGGUF) else content)
        return tmp_path / name

    return write_file


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_tensors(write, version):
    file = GGUFFile.open(write(SmallGGUF(version=version)))
    metadata = file.metadata
    assert (file.version, file.alignment) == (version, 32)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2 and type(metadata["llama.block_count"]) is int
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert list(metadata["tokenizer.ggml.tokens"]) == ["a", "", "ä€", "x" * 300]
    assert metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 2.0, 0.0]
    assert metadata["some.flags"].tolist() == [True, False]
    assert list(metadata["some.empty"]) == []
    assert (metadata["some.byte"], metadata["some.large"]) == (-3, 2**63)

    assert list(file.tensors) == ["a", "b"]
    assert file.tensors["a"].type is TensorType.Q4_0
    assert file.tensors["a"].shape == (2, 32), "GGUF writes the fastest dimension first"
    assert file.tensors["a"].data.tobytes() == bytes(range(36))
    assert file.tensors["b"].dequantize().tolist() == [1, 2, 3]


def test_the_map_is_read_only(write):
    file = GGUFFile.open(write(SmallGGUF()))
    with pytest.raises(ValueError, match="read-only"):
        file.tensors["b"].data[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        file.metadata["tokenizer.ggml.scores"][0] = 1


def test_views_outlive_the_file_object(write):
    tensor = GGUFFile.open(write(SmallGGUF())).tensors["b"]
    assert tensor.dequantize().tolist() == [1, 2, 3]


def test_own_alignment(write):
    pairs = [pair("general.alignment", U32, 256)]
    content = SmallGGUF(pairs=pairs, alignment=256, infos=[info("a", (2,), 0, 256)], data=bytes(256) + bytes(8))
    assert GGUFFile.open(write(content)).tensors["a"].data.tobytes() == bytes(8)


def test_a_scalar_tensor(write):
    content = SmallGGUF(infos=[info("a", (), 0, 0)], data=struct.pack("<f", 7))
    tensor = GGUFFile.open(write(content)).tensors["a"]
    assert tensor.shape == () and tensor.dequantize() == 7


def test_vocabulary_only(write):
    assert GGUFFile.open(write(SmallGGUF(infos=[], data=b""))).tensors == {}


@pytest.mark.slow
def test_agrees_with_the_gguf_package(smollm2):
    gguf = pytest.importorskip("gguf")
    theirs, ours = gguf.GGUFReader(smollm2), GGUFFile.open(smollm2)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.type == tensor.tensor_type
        assert np.array_equal(mine.data, np.ravel(tensor.data).view(np.uint8))
    assert {f"GGUF.{name}" for name in ("version", "tensor_count", "kv_count")} | set(ours.metadata) == set(
        theirs.fields
    )
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (list(value) if isinstance(expected, list) else value) == expected, key


def array_of(kind, count, payload=b""):
    return string("k") + struct.pack("<IIQ", ARRAY, kind, count) + payload


HUGE = 2**64 - 1
BAD = {
    "empty": (b"", "empty"),
    "magic": (SmallGGUF(magic=b"GGML"), "magic is b'GGML'"),
    "short": (b"GGUF\3\0", "version needs 4 bytes at offset 4"),
    "version 1": (SmallGGUF(version=1), r"version is 1; versions \(2, 3\)"),
    "version 4": (SmallGGUF(version=4), "version is 4"),
    "big-endian": (SmallGGUF(version=3 << 24), "big-endian"),
    "tensor count": (SmallGGUF(tensor_count=HUGE), f"tensor count is {HUGE}"),
    "one tensor too many": (SmallGGUF(tensor_count=3), "tensor"),
    "pair count": (SmallGGUF(pair_count=HUGE), f"metadata count is {HUGE}"),
    "key length": (
        SmallGGUF(pairs=[struct.pack("<QI", HUGE, U8) + b"x" * 8]),
        f"metadata key 0 has {HUGE} bytes of text",
    ),
    "key not UTF-8": (SmallGGUF(pairs=[pair(b"\xff", U8, 1)]), "metadata key 0 is .*not UTF-8"),
    "key twice": (SmallGGUF(pairs=[pair("k", U8, 1)] * 2), "metadata key 'k' appears twice"),
    "value type": (SmallGGUF(pairs=[string("k") + struct.pack("<II", 13, 0)]), "'k' has value type 13"),
    "string length": (SmallGGUF(pairs=[string("k") + struct.pack("<IQ", STRING, 2**20)]), "'k' needs 1048576 bytes"),
    "long text": (SmallGGUF(pairs=[pair("k", STRING, "x" * (MAX_TEXT + 1))]), f"'k' has {MAX_TEXT + 1} bytes of text"),
    "string not UTF-8": (SmallGGUF(pairs=[pair("k", STRING, b"\xc3")]), "'k' is .*not UTF-8"),
    "boolean": (SmallGGUF(pairs=[string("k") + struct.pack("<IB", BOOL, 2)]), "'k' is the boolean 2"),
    "boolean array": (SmallGGUF(pairs=[array_of(BOOL, 2, b"\1\2")]), "'k' holds the boolean 2"),
    "array type": (SmallGGUF(pairs=[array_of(13, 0)]), "'k' is an array of value type 13"),
    "array of arrays": (SmallGGUF(pairs=[array_of(ARRAY, 1, struct.pack("<IQ", U8, 0))]), "array of arrays"),
    "array length": (SmallGGUF(pairs=[array_of(U64, HUGE)]), f"'k' needs {HUGE * 8} bytes"),
    "strings length": (SmallGGUF(pairs=[array_of(STRING, HUGE)]), f"'k': has {HUGE} strings"),
    "strings beyond the file": (
        SmallGGUF(pairs=[array_of(STRING, 2, string("a") + struct.pack("<Q", HUGE))]),
        "string 1",
    ),
    "alignment 0": (SmallGGUF(pairs=[pair("general.alignment", U32, 0)]), "general.alignment is 0"),
    "alignment 24": (SmallGGUF(pairs=[pair("general.alignment", U32, 24)]), "general.alignment is 24"),
    "alignment text": (SmallGGUF(pairs=[pair("general.alignment", STRING, "32")]), "general.alignment is '32'"),
    "alignment huge": (
        SmallGGUF(pairs=[pair("general.alignment", U64, 2**63)], infos=[info("a", (1,), 0, 0)]),
        "file has",
    ),
    "tensor name": (SmallGGUF(infos=[info(b"\xff", (1,), 0, 0)]), "name of tensor 0 is .*not UTF-8"),
    "tensor twice": (SmallGGUF(infos=[info("a", (1,), 0, 0), info("a", (1,), 0, 32)]), "tensor 'a' appears twice"),
    "dimensions": (SmallGGUF(infos=[info("a", (1,) * 5, 0, 0)]), "'a' has 5 dimensions; at most 4"),
    "zero": (SmallGGUF(infos=[info("a", (0, 1), 0, 0)]), r"'a' has dimensions \[0, 1\]"),
    "no type": (SmallGGUF(infos=[info("a", (32,), 4, 0)]), "'a' is of type 4, which GGUF does not define"),
    "type of another format": (SmallGGUF(infos=[info("a", (32,), 1000, 0)]), "type 1000"),
    "blocks": (SmallGGUF(infos=[info("a", (33, 2), 2, 0)]), "rows of 33 values; Q4_0 needs a multiple of 32"),
    "overflow": (SmallGGUF(infos=[info("a", (2**32, 2**32, 2**32, 2**32), 0, 0)]), "the whole file has"),
    "unaligned": (SmallGGUF(infos=[info("a", (2,), 0, 4)]), "offset 4, which is not a multiple of the alignment 32"),
    "offset": (SmallGGUF(infos=[info("a", (2,), 0, 2**63)]), "'a' is stored at .* the file has"),
    "cut off": (SmallGGUF(data=SmallGGUF().data[:-1]), "tensor 'b' is stored at .* cut off"),
    "overlap": (SmallGGUF(infos=[info("b", (9,), 0, 0), info("a", (32, 2), 2, 32)]), "'b' overlaps tensor 'a'"),
    "same place": (SmallGGUF(infos=[info("b", (3,), 0, 0), info("a", (3,), 0, 0)]), "overlaps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(write, name):
    content, message = BAD[name]
    path = write(content)
    with pytest.raises(FormatError, match=message) as error:
        GGUFFile.open(path)
    assert str(path) in str(error.value)


def test_known_but_unsupported_types_are_named(write):
    with pytest.raises(UnsupportedError, match="'a' is of type MXFP4; supported are F32, F16, Q4_0"):
        GGUFFile.open(write(SmallGGUF(infos=[info("a", (32,), 39, 0)])))


def test_every_truncation_is_refused(write):
    content = SmallGGUF().build()
    for size in range(len(content)):
        with pytest.raises(FormatError):
            GGUFFile.open(write(content[:size]))


def test_long_hostile_names_do_not_flood_the_message(write):
    with pytest.raises(FormatError) as error:
        GGUFFile.open(write(SmallGGUF(infos=[info("a" * 100_000, (32,), 77, 0)])))
    assert len(str(error.value)) < 1000


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        GGUFFile.open(tmp_path / "no.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        GGUFFile.open(tmp_path)
    for name in ("a\0b", "a" * 10_000, "\ud800"):
        with pytest.raises(FormatError, match="does not exist"):
            GGUFFile.open(name)


@pytest.mark.timeout(30)
def test_many_empty_strings_take_linear_time(write):
    """The fast search for lengths finds nothing here; it must not be tried again and again."""
    count = 500_000
    path = write(SmallGGUF(pairs=[array_of(STRING, count, bytes(8 * count))], infos=[], data=b""))
    assert len(GGUFFile.open(path).metadata["k"]) == count


def split(number, parts, infos, tensors=None, key_type=U16):
    pairs = [pair("split.no", key_type, number), pair("split.count", U16, parts)]
    if tensors is not None:
        pairs.append(pair("split.tensors.count", I32, tensors))
    return SmallGGUF(pairs=pairs, infos=infos, data=bytes(64) if infos else b"")


def test_a_model_in_parts(write):
    write(split(1, 3, [info("a", (2,), 0, 0)]), "m-00002-of-00003.gguf")
    write(split(2, 3, [info("b", (3,), 0, 0)]), "m-00003-of-00003.gguf")
    first = write(split(0, 3, [], tensors=2), "m-00001-of-00003.gguf")
    assert list(GGUFFile.open(first).tensors) == ["a", "b"]


PARTS = {
    "missing": (None, split(0, 2, []), "00002-of-00002.gguf: does not exist"),
    "wrong number": (split(0, 2, []), split(0, 2, []), "split.no is 0; it must be 1"),
    "wrong count": (split(1, 3, []), split(0, 2, []), "split.count is 3; it must be 2"),
    "twice": (split(1, 2, [info("a", (2,), 0, 0)]), split(0, 2, [info("a", (2,), 0, 0)]), "'a' is also in an earlier"),
    "total": (split(1, 2, []), split(0, 2, [], tensors=5), "split.tensors.count is 5, but the parts hold 0"),
    "no integer": (None, SmallGGUF(pairs=[pair("split.count", ARRAY, [2, 3], U16)]), "'split.count' is array"),
    "fraction": (None, SmallGGUF(pairs=[pair("split.count", F32, 2.0)]), "'split.count' is 2.0"),
    "negative": (None, SmallGGUF(pairs=[pair("split.count", I32, -2)]), "'split.count' is -2"),
}


@pytest.mark.parametrize("name", PARTS)
def test_bad_parts_are_refused(write, name):
    second, first, message = PARTS[name]
    if second is not None:
        write(second, "m-00002-of-00002.gguf")
    with pytest.raises(FormatError, match=message):
        GGUFFile.open(write(first, "m-00001-of-00002.gguf"))


@pytest.mark.parametrize("name", ["model.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf"])
def test_a_part_alone_asks_for_the_first(write, name):
    with pytest.raises(FormatError, match="one of 2 files of a model .* open the first"):
        GGUFFile.open(write(split(0, 2, []), name))
