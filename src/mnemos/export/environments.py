"""Python environments of their own for packages that cannot share one with others."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mnemos.errors import MissingDependencyError
from mnemos.formats.whole_file import new_folder
from mnemos.machine.home import home


@dataclass(frozen=True)
class Environment:
    """Packages of versions that work together, in an environment under the user's cache folder.

    name: of its folder; pins: for each package, the beginning of the version that works: {"executorch": "1.5"}.
    """

    name: str
    pins: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where the environment is made; other pins and another Python have another one."""
        told = f"{sys.version_info[:2]} {sorted(self.pins.items())}"
        return home() / "environments" / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def python(self, packages: Sequence[str], purpose: str, make: bool = False) -> Path:
        """This process's interpreter if its own `packages` fit, else the environment's; `make` makes that first.

        MissingDependencyError: there is none yet, and how it is made; or making it failed. purpose: for that error.
        """
        unfit = self._unfit(packages)
        if not unfit:
            return Path(sys.executable)
        if not _python_of(self.folder).exists():
            if not make:
                needed = ", ".join(f"{package} {self.pins[package]}" for package in packages)
                raise MissingDependencyError(
                    f"{purpose} needs {needed}, and here {unfit}; make an environment for it with "
                    f"make_environment=True (--make-environment), or run: {self.command()}"
                )
            self._make()
        return _python_of(self.folder)

    def command(self) -> str:
        """What makes the environment, for a shell."""
        packages = " ".join(f"'{requirement}'" for requirement in self._requirements())
        return f"{sys.executable} -m venv {self.folder} && {_python_of(self.folder)} -m pip install {packages}"

    def _requirements(self) -> list[str]:
        return [f"{package}=={prefix}.*" for package, prefix in self.pins.items()]

    def _unfit(self, packages: Sequence[str]) -> str:
        """What keeps this process's own packages from being used; empty: nothing does."""
        for package in packages:
            prefix = self.pins[package]
            try:
                found = version(package)
            except PackageNotFoundError:
                return f"{package} is not installed"
            if not f"{found}.".startswith(f"{prefix}."):
                return f"{package} is {found}"
        return ""

    def _make(self) -> None:
        with new_folder(self.folder) as draft:
            _run([sys.executable, "-m", "venv", str(draft)], self)
            # To standard error: it takes minutes, and says what it does.
            _run([str(_python_of(draft)), "-m", "pip", "install", *self._requirements()], self)


def _run(command: list[str], environment: Environment) -> None:
    try:
        done = subprocess.run(command, stdout=2, check=False).returncode
    except OSError as error:
        raise MissingDependencyError(
            f"{command[0]} cannot be run: {error.strerror}; run: {environment.command()}"
        ) from error
    if done:
        raise MissingDependencyError(
            f"the environment of {environment.name} cannot be made: {' '.join(command[1:3])} ended with {done}; "
            f"see what it said, or run: {environment.command()}"
        )


def _python_of(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


# One for all, as they share PyTorch: 2.5 GB. NumPy 2.4 breaks what coremltools 9.0 does with arrays of one number;
# litert-torch holds back typing-extensions, and with it whatever else is new.
DEVICES = Environment(
    "devices",
    {
        "torch": "2.13",
        "executorch": "1.5",
        "torchao": "0.18",
        "litert-torch": "0.10",
        "ai-edge-litert": "2.3",
        "coremltools": "9.0",
        "numpy": "2.3" if sys.version_info >= (3, 11) else "2.2",
    },
)
