"""The ways to name a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mnemos.errors import FormatError
from mnemos.hub.sources import resolve


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_itself(tmp_path: Path, kind: type) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(kind(file)) == file
    assert resolve(kind(tmp_path)) == tmp_path


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(FormatError, match="no model 'smollm2-136m'.*did you mean 'smollm2-135m'"):
        resolve("smollm2-136m")
    with pytest.raises(FormatError, match=r"no model '/no/such\.gguf'"):
        resolve("/no/such.gguf")


@pytest.mark.parametrize(
    ("name", "problem"), [("x" * 5000, "too long"), ("a\0b", "null"), ("~no-such-user/model", "home directory")]
)
def test_a_path_that_cannot_be_read_is_told_so(name: str, problem: str) -> None:
    with pytest.raises(FormatError, match=f"cannot be read: .*{problem}"):
        resolve(name)


def test_resolving_a_cached_model_imports_nothing_heavy(smollm2: Path) -> None:
    code = (
        "import sys; from mnemos.hub.sources import resolve; print(resolve('smollm2-135m'));"
        "print([m for m in ('numpy', 'subprocess', 'zipfile', 'hashlib', 'huggingface_hub') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == [str(smollm2), "[]"]
