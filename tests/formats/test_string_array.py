"""String arrays: located by a guess that is verified, decoded in one go, equal to a plain walk."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemos.errors import FormatError
from mnemos.formats import string_array
from mnemos.formats.string_array import locate_strings
from tests.formats.small_files import string

TEXTS = st.text(st.sampled_from("ab\0\1\n ä€😀"), max_size=12) | st.sampled_from(["", "x" * 255, "x" * 256, "\0" * 70])


def located(texts, behind=b""):
    data = np.frombuffer(b"".join(map(string, texts)) + behind, np.uint8)
    return locate_strings("f: k", data, len(texts))


@given(
    st.lists(TEXTS, max_size=60), st.binary(max_size=40), st.sampled_from([16, 64, 1 << 18]), st.sampled_from([1, 3])
)
def test_equals_a_plain_walk(texts, behind, window, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(string_array, "_WINDOW", window)
        patch.setattr(string_array, "_STEPS", steps)
        array = located(texts, behind)
    assert array.strings() == texts == list(array) == array[:]
    assert len(array) == len(texts) and len(array.data) == sum(8 + len(t.encode()) for t in texts)
    assert [array.bytes_at(i).decode() for i in range(len(array))] == texts
    joined, starts = array.joined()
    assert [joined[a:b].decode() for a, b in pairwise(starts)] == texts


def test_a_large_vocabulary_crosses_windows():
    texts = [f"token{i}" * (1 + i % 7) for i in range(60_000)]
    array = located(texts, b"behind")
    assert array.strings() == texts
    assert (array[0], array[-1], array[59_998:]) == (texts[0], texts[-1], texts[59_998:])


def test_strings_that_use_every_control_character():
    texts = ["".join(map(chr, range(32))), "b"]
    assert located(texts).strings() == texts


def test_text_that_looks_like_lengths():
    texts = [b"\x05" + bytes(7) + b"hello", b"\x01" + bytes(7) + b"a" + b"\x01" + bytes(7)]
    assert [located(texts * 9).bytes_at(i) for i in range(18)] == texts * 9


@pytest.mark.parametrize("texts", [[b"a", b"b\xff", b"c"], [b"a", b"", b"\xe2\x82", b"\xac"]])
def test_text_that_is_no_utf8_names_the_string(texts):
    array = located(texts)
    bad = 1 if texts[1] else 2
    assert array[0] == "a" and array.bytes_at(bad) == texts[bad]
    for read in (array.strings, lambda: array[bad], lambda: list(array)):
        with pytest.raises(FormatError, match=f"f: k: string {bad} is .*not UTF-8"):
            read()


def test_index_out_of_range():
    with pytest.raises(IndexError, match="index 2 is outside of 2 strings"):
        located(["a", "b"])[2]


@pytest.mark.parametrize("texts", [["abc"] * 5, [""] * 5, ["x" * 300] * 2])
def test_every_truncation_is_refused(texts):
    data = np.frombuffer(b"".join(map(string, texts)), np.uint8)
    for size in range(len(data)):
        with pytest.raises(FormatError, match="f: k: "):
            locate_strings("f: k", data[:size], len(texts))


def test_lengths_near_the_integers_end():
    for length in (2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1):
        data = np.frombuffer(string("a") + length.to_bytes(8, "little") + bytes(50), np.uint8)
        with pytest.raises(FormatError, match=f"string 1 has {length} bytes"):
            locate_strings("f: k", data, 2)
