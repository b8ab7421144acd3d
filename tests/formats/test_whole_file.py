"""A file is there whole or not at all."""

import errno
import os

import pytest

from mnemos.errors import CapacityError, FormatError
from mnemos.formats.whole_file import late_errors, new_folder, replacing, write_whole


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["model.gguf"]
    umask = os.umask(0)
    os.umask(umask)
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [KeyboardInterrupt, FormatError])
def test_nothing_is_left_when_the_block_raises(tmp_path, error):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"before")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = "pipe: cannot be written: it is a device, a pipe or a socket"
    with pytest.raises(FormatError, match=message), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    problem = "model.gguf: cannot be written: No space left on device; it needs 3.0 MB in a folder with room"
    with pytest.raises(CapacityError, match=problem), replacing(tmp_path / "model.gguf", 3_000_000) as file:
        file.write(b"data")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a process's files")
def test_a_limit_on_the_size_of_files_is_no_room_either(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CapacityError, match="cannot be written: File too large"):
            write_whole(tmp_path / "model.gguf", lambda file: file.write(bytes(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_errors_of_writing_wait_until_the_block_ends(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    reached = False
    with pytest.raises(OSError, match="No space left"), late_errors(Full()) as file:
        assert file.write(b"abc") == 3 and file.write(b"de") == 2
        reached = True
    assert reached


def test_a_file_of_a_folder_that_cannot_be_written_is_named_by_the_folder(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(CapacityError, match=r"made: cannot be written: No space left"),
        new_folder(made := tmp_path / "made") as work,
    ):
        write_whole(work / "one", lambda file: file.write(b"1"))
    assert not made.exists() and not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_named(tmp_path):
    path = tmp_path / "nowhere" / "model.gguf"
    with pytest.raises(FormatError, match="model.gguf: cannot be written: No such file or directory"), replacing(path):
        pass
