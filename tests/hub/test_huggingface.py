"""Models from the Hugging Face hub, with a double of the library's two calls."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnemos.errors import ConfigError, DownloadError, MissingDependencyError
from mnemos.hub import huggingface
from mnemos.hub.sources import resolve
from tests.hub.tiny_wheel import files_below

hub = pytest.importorskip("huggingface_hub")

FOLDER = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "modeling_own.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
}


@pytest.fixture
def serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Serves FOLDER as every repository; returns the list of files that were fetched."""
    return serve_files(monkeypatch, FOLDER)


def serve_files(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[str]:
    fetched: list[str] = []

    def download(repository: str, name: str, local_dir: Path) -> str:
        fetched.append(name)
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(files[name])
        (local_dir / ".cache").mkdir(exist_ok=True)
        return str(local_dir / name)

    class Api:
        def model_info(self, repository: str, files_metadata: bool) -> SimpleNamespace:
            siblings = [SimpleNamespace(rfilename=name, size=len(content)) for name, content in files.items()]
            return SimpleNamespace(siblings=siblings)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return fetched


def test_a_folder_gets_what_loading_needs_and_no_code(serve: list[str], home: Path) -> None:
    path = resolve("hf:org/name")
    assert files_below(path) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert resolve("hf:org/name") == path
    assert len(serve) == 3
    assert files_below(home / "models")[0] == path.name


def test_one_file_can_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_files(monkeypatch, {"q4/model.gguf": b"GGUF", "model-f16.gguf": b"GGUF"})
    path = resolve("hf:org/name:q4/model.gguf")
    assert path.read_bytes() == b"GGUF" and path.name == "model.gguf"


def test_a_repository_of_gguf_files_asks_which(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_files(monkeypatch, {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    with pytest.raises(DownloadError, match=r"name one of its GGUF files: hf:org/name:a\.gguf, hf:org/name:b\.gguf"):
        resolve("hf:org/name")
    with pytest.raises(DownloadError, match=r"no file 'c\.gguf'; it has a\.gguf, b\.gguf"):
        resolve("hf:org/name:c.gguf")
    assert files_below(home / "models") == []


@pytest.mark.parametrize(
    "reference", ["hf:", "hf:name", "hf:a/b/c", "hf:../name", "hf:a/..", "hf:org/name:", "hf:a/b:../x", "hf:a/b:/x"]
)
def test_what_does_not_look_like_a_reference_is_refused(home: Path, reference: str) -> None:
    with pytest.raises(ConfigError, match="hf:"):
        resolve(reference)


class ConnectError(Exception):
    """As httpx has one, which is neither an OSError nor one of the hub's own."""

    __module__ = "httpx2"


@pytest.mark.parametrize("kind", [ConnectionError, ConnectError, TimeoutError, socket.gaierror])
def test_a_lost_connection_leaves_nothing(
    kind: type[Exception], serve: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repository: str, name: str, local_dir: Path) -> str:
        (local_dir / "config.json").touch()
        raise kind("network is unreachable")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(DownloadError, match="cannot fetch hf:org/name: no connection"):
        resolve("hf:org/name")
    assert files_below(home / "models") == []


def test_a_hub_out_of_reach_is_told_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, repository: str, files_metadata: bool) -> None:
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    with pytest.raises(DownloadError, match="no connection to the hub .*give the path of a folder"):
        resolve("hf:org/name")


def test_a_full_disk_is_told_so(serve: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, name: str, local_dir: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(DownloadError, match="cannot store the model in .*: No space left on device"):
        resolve("hf:org/name")
    assert files_below(home / "models") == []


def test_without_the_library_the_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mnemos\[hub\]'"):
        resolve("hf:org/name")


def test_a_reference_is_taken_apart() -> None:
    assert huggingface.parse("hf:org/name:a.gguf") == huggingface.HubReference("org/name", "a.gguf")
