"""Mutated files are read or refused with a MnemosError: nothing else is raised, nothing hangs or fills the memory."""

import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemos.errors import MnemosError
from tests.formats.fuzz import EXTREMES, Target, mutate, open_file, read_all
from tests.formats.small_files import ARRAY, F32, STRING, U32, SmallGGUF, info, pair, safetensors, small_safetensors

pytestmark = pytest.mark.timeout(120)

NAMES = st.text(st.sampled_from("ab.ä"), max_size=4)
TENSORS = st.lists(
    st.tuples(
        NAMES,
        st.lists(st.sampled_from([0, 1, 2, 3, 32, 64, 256, 2**32, 2**63]), max_size=5),
        st.sampled_from([0, 1, 2, 3, 4, 8, 12, 14, 20, 23, 24, 30, 39, 1000]),
        st.sampled_from([0, 0, 32, 64, 128, 1024, 4, 2**64 - 32]),
    ),
    max_size=4,
)
CUTS = st.none() | st.integers(0, 2000)


@st.composite
def gguf_files(draw):
    """Files that are almost right."""
    pairs = draw(st.lists(st.sampled_from(SmallGGUF().pairs), unique=True))
    pairs += draw(
        st.lists(
            st.builds(
                lambda n, k: pair("general.alignment", k, n), st.sampled_from([0, 1, 8, 64, 2**31]), st.just(U32)
            ),
            max_size=1,
        )
    )
    pairs += draw(
        st.lists(st.builds(lambda k, v: pair(k, ARRAY, v, STRING), NAMES, st.lists(NAMES, max_size=9)), max_size=2)
    )
    infos = [info(name, tuple(sizes), kind, offset) for name, sizes, kind, offset in draw(TENSORS)]
    count = draw(st.none() | st.sampled_from(EXTREMES))
    return SmallGGUF(
        pairs=pairs, infos=infos, tensor_count=count, data=bytes(draw(st.sampled_from([0, 64, 5000])))
    ).build()


@st.composite
def mutations(draw, files):
    content = draw(files)
    patches = mutate(content, random.Random(draw(st.integers(0, 2**32))), 0, len(content))
    content = bytearray(content)
    for at, patch in draw(st.sampled_from([patches, []])):
        content[at : at + len(patch)] = patch
    return bytes(content[: draw(CUTS)])


def open_and_read(path, content):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        opened = open_file(path)
        read_all(*opened)
    except MnemosError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 * len(content) + (2 << 20)  # reading expands what opening does not


@pytest.mark.slow
@settings(max_examples=400)
@given(content=mutations(gguf_files()))
def test_gguf(tmp_path_factory, content):
    open_and_read(tmp_path_factory.getbasetemp() / "fuzz.gguf", content)


@settings(max_examples=300)
@given(content=mutations(st.just(SmallGGUF().build())))
def test_gguf_patched(tmp_path_factory, content):
    open_and_read(tmp_path_factory.getbasetemp() / "fuzz.gguf", content)


@settings(max_examples=300)
@given(content=mutations(st.just(small_safetensors())))
def test_safetensors_patched(tmp_path_factory, content):
    open_and_read(tmp_path_factory.getbasetemp() / "fuzz.safetensors", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([2**62, 2**64, -1, "F32", "BF16", "F4"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "U16"]) | JSON,
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62]), max_size=4) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 2**62]), min_size=2, max_size=2) | JSON,
    }
)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    header=st.dictionaries(NAMES | st.just("__metadata__"), ENTRIES | JSON, max_size=4) | JSON,
    size=st.sampled_from([0, 4, 24]),
)
def test_safetensors_headers(tmp_path_factory, header, size):
    open_and_read(tmp_path_factory.getbasetemp() / "fuzz.safetensors", safetensors(header, bytes(size)))


@pytest.mark.slow
def test_real_metadata(smollm2, tmp_path):
    """A short run of the loop in fuzz.py."""
    target = Target(smollm2, tmp_path)
    tracemalloc.start()
    try:
        results = [target.run(seed) for seed in range(60)]
    finally:
        tracemalloc.stop()
    assert "opened" in results and "FormatError" in results


@pytest.mark.parametrize(
    ("count", "first_pair", "message"),
    [
        (1 << 26, pair("k", F32, 1), "appears twice"),
        (1, pair("k", ARRAY, [], STRING)[:-8] + struct.pack("<Q", 1 << 29), "strings"),
    ],
)
def test_a_large_sparse_file_costs_nothing(tmp_path, count, first_pair, message):
    """Counts that the file's size allows, with content of only zeros."""
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, count, count) + first_pair)
        file.truncate(1 << 33)
    with pytest.raises(MnemosError, match=message):
        open_file(path)
