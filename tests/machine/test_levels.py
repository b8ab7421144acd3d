"""Each class of operators runs at the level that is fastest on this machine, by measurement or by order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnemos import _native
from mnemos.errors import ConfigError, UnsupportedError
from mnemos.machine.levels import (
    OPERATORS,
    Choice,
    choice_path,
    describe_levels,
    machine_fingerprint,
    measure_levels,
    read_choice,
    write_choice,
)

LOWEST, BEST = _native.available_isas()[0], _native.available_isas()[-1]
several = pytest.mark.skipif(LOWEST == BEST, reason="this machine has one level")
USE = "from mnemos.machine.levels import levels_in_use; import json; print(json.dumps(levels_in_use()))"


def used(home: Path, **environment: str) -> dict[str, str]:
    """The levels in a separate process."""
    clean = {name: value for name, value in os.environ.items() if name != "MNEMOS_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**clean, "MNEMOS_HOME": str(home), **environment},
        capture_output=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def _kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this machine's choice in a folder of Mnemos."""
    monkeypatch.setenv("MNEMOS_HOME", str(home))
    return choice_path(machine_fingerprint())


@several
def test_the_first_process_measures_and_the_next_does_as_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _kept(tmp_path, monkeypatch)
    first = used(tmp_path)
    choice = read_choice(kept)
    assert choice is not None and choice.levels == first and choice.fingerprint == machine_fingerprint()
    lowest = dict.fromkeys(OPERATORS, LOWEST)
    write_choice(kept, Choice(machine_fingerprint(), lowest, choice.seconds))
    assert used(tmp_path) == lowest


@several
@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": "another CPU", "levels": {}, "seconds": {}}'])
def test_a_file_of_another_machine_or_none_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    kept = _kept(tmp_path, monkeypatch)
    kept.parent.mkdir()
    kept.write_text(content)
    used(tmp_path)
    choice = read_choice(kept)
    assert choice is not None and choice.fingerprint == machine_fingerprint()


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert set(used(tmp_path / "file")) == set(OPERATORS)


@several
def test_installations_that_share_a_folder_keep_their_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    other = choice_path("another build")
    write_choice(other, Choice("another build", dict.fromkeys(OPERATORS, LOWEST), {}))
    written = other.read_bytes()
    used(tmp_path)
    assert other.read_bytes() == written
    assert {path.name for path in other.parent.iterdir()} == {other.name, choice_path(machine_fingerprint()).name}


@several
def test_the_environment_forces_all_or_some(tmp_path: Path) -> None:
    assert set(used(tmp_path, MNEMOS_ISA=LOWEST).values()) == {LOWEST}
    assert not list(tmp_path.iterdir())
    some = used(tmp_path, MNEMOS_ISA=f"attention={LOWEST}")
    assert some["attention"] == LOWEST and some["quantized"] != LOWEST


@several
def test_the_likely_level_stays_unless_another_is_clearly_faster() -> None:
    likely = {operators: _native.likely_isa(operators) for operators in OPERATORS}
    lucky = measure_levels("here", lambda operators, level: 1.0 if level == likely[operators] else 0.97)
    assert lucky.levels == likely
    other = next(level for level in reversed(_native.available_isas()) if level != likely["attention"])
    faster = measure_levels("here", lambda operators, level: 0.5 if level == other else 1.0)
    assert set(faster.levels.values()) == {other}


def test_operators_that_are_not_named_go_back() -> None:
    before = {operators: _native.isa(operators) for operators in OPERATORS}
    try:
        _native.select_isa(f"floats={LOWEST}")
        assert {operators: _native.isa(operators) for operators in OPERATORS} == {**before, "floats": LOWEST}
    finally:
        _native.select_isa("")
    assert {operators: _native.isa(operators) for operators in OPERATORS} == before


def test_what_is_no_class_or_no_level_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="quantized, floats, attention"):
        _native.select_isa(f"norms={LOWEST}")
    with pytest.raises(UnsupportedError, match=LOWEST):
        _native.select_isa("attention=sse9")
    with pytest.raises(ConfigError, match="norms"):
        _native.isa("norms")


@pytest.mark.parametrize("operators", OPERATORS)
def test_a_trial_of_every_level_takes_some_time(operators: str) -> None:
    assert all(1e-7 < _native.trial_seconds(operators, level) < 1 for level in _native.available_isas())


def test_levels_are_named_once_where_they_are_the_same() -> None:
    assert describe_levels(dict.fromkeys(OPERATORS, "avx2")) == "avx2"
    mixed = {"quantized": "avx512", "floats": "amx", "attention": "amx"}
    assert describe_levels(mixed) == "avx512 for quantized, amx for floats, amx for attention"


def test_a_choice_for_levels_that_are_not_there_is_no_choice(tmp_path: Path) -> None:
    path = tmp_path / "levels.json"
    write_choice(path, Choice("here", dict.fromkeys(OPERATORS, "sse9"), {}))
    assert read_choice(path) is None
