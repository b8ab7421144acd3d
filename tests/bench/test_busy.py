"""What `mnemos bench --busy` measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mnemos.bench import busy
from mnemos.bench.busy import busy_programs, fair_share, measure_beside
from mnemos.machine.figures import usable_cores
from tests.bench.test_steps import CountingModel


@pytest.mark.parametrize(("cores", "others", "share"), [(2, 2, 0.5), (2, 1, 2 / 3), (8, 0, 1.0)])
def test_every_thread_of_every_program_has_the_same_share(cores: int, others: int, share: float) -> None:
    assert fair_share(cores, others) == pytest.approx(share)


def test_busy_programs_run_meanwhile_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(start(*args)) or started[-1])
    with busy_programs(2):
        assert [program.poll() for program in started] == [None, None]
    assert len(started) == 2 and all(program.returncode for program in started)


def test_a_figure_beside_others_is_held_against_its_fair_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "open_checkpoint", lambda path: path)
    monkeypatch.setattr(busy, "load_model", lambda checkpoint, backend: CountingModel())
    alone, *beside = list(measure_beside(Path("model"), "native"))[::2]
    assert alone.metric == "tg128" and alone.limit is None
    assert beside[-1].metric == f"tg128 beside {usable_cores()}" and beside[-1].bound == "fair share"
    assert beside[-1].limit == pytest.approx(alone.value / 2)
