"""The structure of the package: imports go down, never in a circle, and a file has one subject."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "mnemos"
# From the bottom up. A module may import from its own floor or below.
FLOORS = (
    ("errors", "version"),
    ("contract", "native", "rules"),
    ("machine",),
    ("formats", "hub"),
    ("text", "ops"),
    ("decoding",),
    ("memory",),
    ("models",),
    ("engine",),
    ("compress",),
    ("export",),
    ("serve", "cluster"),
    ("compat", "bench"),
    ("cli",),
)
LONGEST = 400
# Files that are longer because their subject is, and why.
LONG_FILES: dict[str, str] = {
    "contract": "what rooms say to each other, in one place: mostly documentation",
    "decoding.fields": "a table with a row for each field",
    "engine.engine": "what programs call: mostly signatures and their documentation",
}
NATIVE = PACKAGE.parents[1] / "native"
LONG_NATIVE_FILES = {
    "bindings.cpp": "the list of all that Python sees, function by function",
    "linear/product_quantized.h": "one tile, whose steps share its registers",
    "program/schedule.cpp": "one walk over the operators, which decides what is fused",
    "program/attention_task.cpp": "one operator: how its work is cut, done and put together",
    "program/memory_task.cpp": "one operator: keys filled in, spans read, their parts joined and pooled",
    "system/pool.cpp": "one crew of threads: how they meet, wait, leave for others' sake and join again",
    "text/unicode_data.cpp": "tables that tools/unicode_tables.py writes",
    "vector/attention_impl.h": "one kernel, for each type of cache",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `mnemos.`; the package itself is ""."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imported_by(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, at its top, inside a function or for its types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name.removeprefix("mnemos.") in MODULES else node.module for name in inner]
        else:
            continue
        for target in targets:
            if target == "mnemos" or target.startswith("mnemos."):
                name = target.removeprefix("mnemos").removeprefix(".")
                if name in MODULES:  # not the native core, which is not Python
                    yield name


IMPORTS = {name: set(imported_by(path)) for name, path in MODULES.items()}


def floor_of(name: str) -> int:
    room = name.partition(".")[0]
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return floor
    return len(FLOORS)  # the package itself and `python -m mnemos`


def test_every_room_has_a_floor() -> None:
    rooms = {name.partition(".")[0] for name in MODULES} - {"", "__main__"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


def test_the_architecture_page_names_every_room_and_only_files_that_exist() -> None:
    page = (NATIVE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE))
    assert rows == {room for rooms in FLOORS for room in rooms}
    named = re.findall(r"\b(?:\w+/)+\w+\.(?:py|cpp|h)\b", page)
    places = (PACKAGE, NATIVE.parent)
    assert named and not [name for name in named if not any((place / name).is_file() for place in places)]


def test_imports_go_down() -> None:
    climbs = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in targets
        if floor_of(target) > floor_of(name) and target  # cli asks the package itself for its version
    ]
    assert not climbs


def test_modules_imported_by_name_are_below_too() -> None:
    """`import_module` of a text, which `imported_by` does not see, is no way up; but for the one that is listed."""
    asked = {
        (name, node.args[0].value)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func)
        if isinstance(node.args[0], ast.Constant) and str(node.args[0].value).partition(".")[0] == "mnemos"
    }
    assert asked == {("native", "mnemos._native"), ("engine.pretrained", "mnemos")}


def test_no_imports_go_in_a_circle() -> None:
    def way_back(name: str) -> list[str]:
        """A shortest chain of imports from `name` back to itself."""
        ways = {target: [name, target] for target in IMPORTS[name]}
        ahead = list(ways)
        for module in ahead:
            if module == name:
                return ways[name]
            for target in IMPORTS[module] - ways.keys():
                ways[target] = [*ways[module], target]
                ahead.append(target)
        return []

    circles = {" -> ".join(way) for name in IMPORTS if name and (way := way_back(name))}
    assert not circles


def test_every_public_class_and_function_says_what_it_is() -> None:
    """Methods may go without: a name such as `free` or an operator's in a backend says enough."""
    commands = {"add_arguments", "run"}  # of each module of `cli`, see cli/main.py
    silent = [
        f"{name}.{node.name}"
        for name, path in MODULES.items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and not node.name.startswith("_")
        and not (name.startswith("cli.") and node.name in commands)
        and not ast.get_docstring(node)
    ]
    assert not silent


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name))
def test_a_file_is_no_longer_than_its_subject(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    if name in LONG_FILES:
        assert lines > LONGEST, f"{name} has {lines} lines: it needs no reason any more"
    else:
        assert lines <= LONGEST, f"{name} has {lines} lines: look for the two things that it holds, or give a reason"


def test_native_files_are_no_longer_than_their_subjects() -> None:
    sources = [path for path in NATIVE.rglob("*") if path.suffix in (".h", ".cpp")]
    lengths = {path.relative_to(NATIVE).as_posix(): len(path.read_bytes().splitlines()) for path in sources}
    assert {name for name, lines in lengths.items() if lines > LONGEST} == set(LONG_NATIVE_FILES)
