"""Which heads recall unless somebody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mnemos.contract import KVLayout
from mnemos.memory import calibration
from mnemos.memory.calibration import far_count, far_heads, usual_share


def test_half_of_the_heads_recall() -> None:
    layout = KVLayout(30, 3, 64)
    assert far_count(layout, usual_share(layout)) == 45


def test_all_heads_recall_in_the_layers_that_see_everything_where_others_have_windows() -> None:
    """As in Gemma 3: three layers of eighteen, whose single heads are all needed."""
    layout = KVLayout(18, 1, 256, windows=(512, 512, 512, 512, 512, 0) * 3)
    assert far_count(layout, usual_share(layout)) == 3


def test_far_heads_and_the_queries_that_name_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those heads whose attention goes far; the third of their queries that this changes most, and the best of each."""
    model: Any = SimpleNamespace(spec=SimpleNamespace(layout=KVLayout(2, 2, 64), fingerprint=""))
    shares = [[[0.9, 0.1, 0.5], [0.1, 0.3, 0.2]], [[0.3, 0.0, 0.3], [0.1, 0.0, 0.9]]]
    changes = [[[9, 8, 1], [2, 1, 7]], [[3, 4, 0], [6, 5, 0]]]
    recalled = np.array([shares, changes], dtype=np.float32)
    monkeypatch.setattr(calibration, "measure", lambda *_: recalled)
    far = far_heads(model, 0.75)
    assert far.heads == ((0, 1), (1,)) and far.naming == (((0, 1), (2,)), ((), (0,)))
    far = far_heads(model, 1e-3)
    assert far.heads == ((0,), ()) and far.naming == (((0,), ()), ((), ()))
    assert far_heads(model, 1.0).naming == ()
    recalled[1] = 0
    assert far_heads(model, 0.5).naming == (((), ()), ((), ()))  # all queries, where nothing was measured


def test_what_another_version_measured_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    model: Any = SimpleNamespace(spec=SimpleNamespace(layout=KVLayout(1, 2, 64), fingerprint="f" * 40))
    recalled = np.array([[[[0.5], [0.1]]], [[[1], [2]]]], dtype=np.float32)
    monkeypatch.setattr(calibration, "measure", lambda *_: recalled)
    (tmp_path / "recall").mkdir()
    file = tmp_path / "recall" / f"{'f' * 32}.json"
    old: tuple[dict[str, object], ...] = {"format": 1, "shares": [[0.1, 0.5]]}, {"format": 2, "changes": [[[1], [2]]]}
    for content in old:
        file.write_text(json.dumps({"fingerprint": "f" * 40, **content}), encoding="utf-8")
        assert far_heads(model, 0.5).heads == ((0,),)
        assert json.loads(file.read_text(encoding="utf-8"))["recalled"] == recalled.tolist()
