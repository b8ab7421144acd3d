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
    cpu_model,
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
def test_a_measurement_on_busy_cores_chooses_levels_that_later_processes_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _kept(tmp_path, monkeypatch)
    endless = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(endless) for _ in range(2 * _native.usable_cores())]
    try:
        disturbed = used(tmp_path)
    finally:
        for program in programs:
            program.kill()
            program.wait()
    choice = read_choice(kept)
    assert choice is not None and choice.levels == disturbed
    assert all(disturbed[operators] in choice.seconds[operators] for operators in OPERATORS)
    written = kept.read_bytes()
    assert used(tmp_path) == disturbed and kept.read_bytes() == written


def _file(**changes: object) -> str:
    """A choice of this machine for the best level alone, as it is written, with some fields replaced."""
    choice = {
        "fingerprint": machine_fingerprint(),
        "levels": dict.fromkeys(OPERATORS, BEST),
        "seconds": {operators: {BEST: 1e-5} for operators in OPERATORS},
    }
    return json.dumps({**choice, **changes})


DAMAGED = {
    "empty": "",
    "cut short": _file()[:-9],
    "a list": "[]",
    "too deep": "[" * 100_000,
    "another CPU's": _file(fingerprint="another CPU"),
    "no levels": _file(levels={}),
    "levels that are lists": _file(levels={operators: [BEST] for operators in OPERATORS}),
    "a level that is not there": _file(levels=dict.fromkeys(OPERATORS, "sse9")),
    "no seconds": _file(seconds={}),
    "seconds that are text": _file(seconds={operators: {BEST: "soon"} for operators in OPERATORS}),
}


@pytest.mark.parametrize("content", [DAMAGED[name] for name in DAMAGED if name != "another CPU's"])
def test_a_damaged_file_is_no_choice(tmp_path: Path, content: str) -> None:
    path = tmp_path / "levels.json"
    path.write_text(_file())
    assert read_choice(path) is not None
    path.write_text(content)
    assert read_choice(path) is None


@several
@pytest.mark.parametrize("content", [DAMAGED["another CPU's"], DAMAGED["levels that are lists"]])
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
    others = [level for level in _native.available_isas() if level not in (likely["attention"], "amx_bf16")]
    faster = measure_levels("here", lambda operators, level: 0.5 if level == others[-1] else 1.0)
    assert set(faster.levels.values()) == {others[-1]}


@several
def test_a_level_that_is_slower_for_single_rows_is_never_chosen_by_itself() -> None:
    choice = measure_levels("here", lambda operators, level: 0.1 if level == "amx_bf16" else 1.0)
    assert "amx_bf16" not in choice.levels.values()


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


def test_a_file_that_cannot_be_written_whole_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="space"):
        write_choice(tmp_path / "levels.json", Choice("here", dict.fromkeys(OPERATORS, BEST), {}))
    assert not list(tmp_path.iterdir())


X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: {model}
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 1

processor\t: 1
model\t\t: 99
"""
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {model}\n"


@pytest.mark.parametrize("text", [X86, ARM])
def test_processors_of_the_same_name_are_told_apart(tmp_path: Path, text: str) -> None:
    described = []
    for model in ("143", "207"):
        path = tmp_path / model
        path.write_text(text.format(model=model))
        described.append(cpu_model(str(path)))
        assert model in described[-1].split(", ")
    assert described[0] != described[1]
    assert cpu_model() in machine_fingerprint()
