"""The page's files: whole, from this server alone, under a policy that holds, and nothing else from the disk."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from mnemos.serve.page_files import FOLDER, page_files, page_routes

FILES = page_files()
OWN = [path for path in FOLDER.rglob("*") if path.suffix in (".js", ".css", ".html") and "vendor" not in path.parts]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(FOLDER).as_posix() for path in paths]


def test_the_policy_allows_this_server_alone() -> None:
    policy = FILES["/"].response({}).headers["content-security-policy"]
    sources = dict(part.split(" ", 1) for part in policy.split("; "))
    assert sources.pop("img-src") == "'self' data:"
    assert set(sources.values()) <= {"'self'", "'none'"}
    assert sources["default-src"] == sources["base-uri"] == sources["frame-ancestors"] == "'none'"


@pytest.mark.parametrize("path", OWN, ids=names(OWN))
def test_a_source_of_the_page_needs_nothing_that_the_policy_forbids(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
    assert not addresses, f"{path.name} names another host"
    if path.suffix == ".html":
        assert not re.search(r"<style|\bstyle=|\bon\w+=|<script>", text), "inline code or style"
    for name in re.findall(r'(?:from|import\() ?"(\.[^"]+)"|^import "(\.[^"]+)"', text, re.MULTILINE):
        assert (path.parent / (name[0] or name[1])).is_file(), f"{path.name} imports {name}, which does not exist"


def test_the_files_that_the_page_names_are_there() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:href|src)="([^"]+)"', html)
    assert named
    for name in named:
        assert f"/{name}" in FILES


def test_every_library_is_listed_with_its_licence() -> None:
    vendor = FOLDER / "vendor"
    listed = (vendor / "README.md").read_text(encoding="utf-8")
    for path in vendor.iterdir():
        if path.name not in ("README.md", "licences"):
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in listed
    for package in ("htm", "preact", "marked", "dompurify", "highlight.js", "katex"):
        assert "copyright" in (vendor / "licences" / f"{package}.txt").read_text(encoding="utf-8").lower()


def test_the_page_without_formulas_is_small() -> None:
    first = [file for path, file in FILES.items() if "/vendor/katex/" not in path and "/vendor/highlight/" not in path]
    assert sum(len(file.compressed or file.content) for file in first) < 110_000
    everything = sum(len(file.content) for file in FILES.values())
    assert everything < 1_000_000


def test_a_file_is_compressed_for_those_who_take_it() -> None:
    file = FILES["/page/js/main.js"]
    plain, compressed = file.response({}), file.response({"accept-encoding": "gzip, br"})
    assert "content-encoding" not in plain.headers
    assert compressed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(bytes(compressed.body)) == plain.body == file.path.read_bytes()


def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    file = FILES["/page/css/base.css"]
    tag = file.response({}).headers["etag"]
    again = file.response({"if-none-match": tag})
    assert again.status_code == 304
    assert again.body == b""
    assert file.response({"if-none-match": '"another"'}).status_code == 200


def test_routes_answer_the_files_and_no_others() -> None:
    routes = {route.path for route in page_routes(FILES)}
    assert routes == set(FILES)
    assert not any(".." in path or path.endswith(".md") for path in routes)
