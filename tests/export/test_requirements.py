"""The oldest versions of other packages that exporters take."""

from __future__ import annotations

import re
from pathlib import Path

from mnemos.export.requirements import OLDEST


def test_the_extras_install_what_the_exporters_take() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = {
        name: dict(re.findall(r'"([\w-]+)>=([\w.]+)"', packages))
        for name, packages in re.findall(r"^(export|openvino) = \[(.*)\]$", project, re.MULTILINE)
    }
    assert extras["export"] | extras["openvino"] == OLDEST
    assert extras["export"]["torch"] == extras["openvino"]["torch"]
