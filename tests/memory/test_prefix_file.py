"""The prefix cache survives a restart, and a foreign or damaged file does no harm."""

from __future__ import annotations

import errno
import json
import os
import struct
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, FormatError, MnemosError, UnsupportedError
from mnemos.memory import prefix_file
from tests.engine.toys import ToyModel, toy_greedy

PROMPT = list(range(1, 60))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "prefixes.bin"
    with InferenceEngine(ToyModel(), cache_tokens=4000) as engine:
        engine.generate(PROMPT, max_new_tokens=5)
        engine.generate([7] * 30, max_new_tokens=5, cache_salt="mine")
        assert engine.save_prefix_cache(path) == 15 + 8
    assert [file.name for file in tmp_path.iterdir()] == ["prefixes.bin"]
    return path


def test_a_restart_finds_the_prefixes(saved: Path) -> None:
    with InferenceEngine(ToyModel(), cache_tokens=4000) as engine:
        assert engine.load_prefix_cache(saved) == 23
        assert engine.load_prefix_cache(saved) == 0
        completion = engine.complete(PROMPT, max_new_tokens=5)
        assert completion.usage.cached_tokens == 56
        assert completion.token_ids == toy_greedy(PROMPT, 5)
        assert engine.complete([7] * 30, max_new_tokens=2).usage.cached_tokens == 0
        mine = engine.complete([7] * 30, max_new_tokens=2, cache_salt="mine")
        assert mine.usage.cached_tokens == 28
        assert mine.token_ids == toy_greedy([7] * 30, 2)


def test_a_small_cache_takes_what_fits(saved: Path) -> None:
    with InferenceEngine(ToyModel(), cache_tokens=40) as engine:
        assert engine.load_prefix_cache(saved) == 10
        assert engine.stats().pages_used == 10
        assert engine.complete(PROMPT[:20], max_new_tokens=5).token_ids == toy_greedy(PROMPT[:20], 5)


@pytest.mark.parametrize(
    "model",
    [ToyModel(fingerprint="another"), ToyModel(page_size=8)],
)
def test_another_model_is_refused(saved: Path, model: ToyModel) -> None:
    with InferenceEngine(model, cache_tokens=4000) as engine:
        with pytest.raises(FormatError, match=r"prefixes.bin"):
            engine.load_prefix_cache(saved)
        assert engine.stats().pages_used == 0


def test_what_cannot_be_bound_or_written_is_refused(tmp_path: Path, saved: Path) -> None:
    with InferenceEngine(ToyModel(fingerprint="")) as engine, pytest.raises(UnsupportedError, match="fingerprint"):
        engine.save_prefix_cache(tmp_path / "file")
    with InferenceEngine(ToyModel(), prefix_cache=False) as engine, pytest.raises(ConfigError, match="prefix_cache"):
        engine.save_prefix_cache(tmp_path / "file")
    with InferenceEngine(ToyModel()) as engine:
        with pytest.raises(FormatError, match="cannot be written"):
            engine.save_prefix_cache(tmp_path / "no" / "folder")
        with pytest.raises(FormatError, match="cannot be written: this is no file"):
            engine.save_prefix_cache(tmp_path)
        for use in (engine.save_prefix_cache, engine.load_prefix_cache):
            with pytest.raises(FormatError, match="embedded null"):
                use(tmp_path / "a\0b")
        with pytest.raises(FormatError, match="cannot be read"):
            engine.load_prefix_cache(tmp_path / "nothing")


def test_a_full_disk_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    with InferenceEngine(ToyModel(), cache_tokens=4000) as engine:
        engine.generate(PROMPT, max_new_tokens=5)
        monkeypatch.setattr(prefix_file, "_pieces", full)
        with pytest.raises(CapacityError, match="cannot be written: No space left on device; it needs .* in a folder"):
            engine.save_prefix_cache(saved)
        assert engine.generate(PROMPT, max_new_tokens=5) == PROMPT + toy_greedy(PROMPT, 5)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["prefixes.bin"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_damage_is_noticed(saved: Path, tmp_path: Path, position: float, value: int, cut: bool) -> None:
    content = bytearray(saved.read_bytes())
    index = int(position * len(content))
    if cut:
        del content[index:]
    else:
        content[index] ^= value
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    with InferenceEngine(ToyModel(), cache_tokens=4000) as engine:
        with pytest.raises(FormatError, match="damaged"):
            engine.load_prefix_cache(damaged)
        assert engine.stats().pages_used == 0


def forge(saved: Path, **changes: object) -> Path:
    """A file with another header and a right checksum."""
    content = saved.read_bytes()
    magic, version, length = struct.unpack_from("<8sII", content)
    header = {**json.loads(content[16 : 16 + length]), **changes}
    text = json.dumps(header).encode()
    body = struct.pack("<8sII", magic, version, len(text)) + text + content[16 + length : -32]
    forged = saved.with_name("forged")
    forged.write_bytes(body + sha256(body).digest())
    return forged


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": 3},
        {"nodes": []},
        {"nodes": [[0, 0, [1, 2, 3, 4]]]},
        {"nodes": [[-1, 5, [1, 2, 3, 4]]]},
        {"nodes": [[-1, 0, [1, 2, 3]]]},
        {"nodes": [[-1, 0, [1, 2, 3, 97]]]},
        {"nodes": [[-1, 0, [1, 2, 3, True]]]},
        {"nodes": [[-1, 0, [1, 2, 3, 4]], [0, 1, [1, 2, 3, 4]]]},
        {"page_bytes": 1 << 40},
        {"page_bytes": -1},
        {"salts": [3, 4]},
        {"salts": None},
        {"layout": {}},
        {"fingerprint": "x"},
    ],
)
def test_hostile_headers_are_refused(saved: Path, changes: dict[str, object]) -> None:
    forged = forge(saved, **changes)
    with InferenceEngine(ToyModel(), cache_tokens=4000) as engine:
        with pytest.raises(FormatError):
            engine.load_prefix_cache(forged)
        assert engine.stats().pages_used == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"MNEMOSPC", struct.pack("<8sII", b"MNEMOSPC", 9, 0) + bytes(32),
     struct.pack("<8sII", b"MNEMOSPC", 1, 0xFFFFFFFF) + bytes(32)],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with InferenceEngine(ToyModel()) as engine, pytest.raises(MnemosError, match="file"):
        engine.load_prefix_cache(path)
