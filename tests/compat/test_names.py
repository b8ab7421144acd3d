"""The public names: each is where the package says, for programs and for type checkers alike."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mnemos


def test_type_checkers_see_what_programs_get() -> None:
    """The imports for type checkers match the table by which names are found at run time."""
    tree = ast.parse(Path(mnemos.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname  # what makes it public
    }
    assert seen == mnemos._HOMES
    assert set(mnemos.__all__) == {*seen, "__version__"} == set(dir(mnemos))


def test_every_name_is_there() -> None:
    pytest.importorskip("torch")
    for name in mnemos.__all__:
        assert getattr(mnemos, name) is not None
    with pytest.raises(AttributeError, match="module 'mnemos' has no attribute 'Engine'; it has BatchInference, "):
        _ = mnemos.Engine


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; import mnemos; print(*(m for m in sys.modules if m.startswith('mnemos.') or m == 'numpy'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_name_that_needs_pytorch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import mnemos; mnemos.PrunedModel"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "MissingDependencyError: mnemos.PrunedModel needs PyTorch: pip install 'mnemos[torch]'"
    assert run.stderr.splitlines()[-1].endswith(message)
