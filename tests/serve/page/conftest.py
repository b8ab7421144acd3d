"""A headless Chromium in front of a scripted server; skipped where either is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page.scripted import Script, ScriptedServer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# A page without any of these is at fault, whatever a test looks at.
HARMLESS_MESSAGES = (
    "ERR_INCOMPLETE_CHUNKED_ENCODING",
    "ERR_CONNECTION",
    "ERR_FAILED",
    "status of 401",
    "status of 400",
    "ERR_EMPTY",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser, started once."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with Playwright: pip install playwright"
    )
    if not CHROMIUM:
        pytest.skip("the page is tested in Chromium, which is not installed; set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def script() -> Script:
    """What the server will answer; a test changes it as it goes."""
    return Script()


@pytest.fixture
def server(script: Script) -> Iterator[ScriptedServer]:
    """The scripted server, running."""
    with ScriptedServer(script) as running:
        yield running


@pytest.fixture
def open_page(chromium: Any, server: ScriptedServer) -> Iterator[Any]:
    """A function that opens the page in a fresh browser profile: `open_page(viewport=..., ...)`.

    Afterwards it checks that no script failed, that the policy had nothing to refuse, and that no other host was asked.
    """
    contexts, problems, hosts = [], [], set()

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and not any(known in message.text for known in HARMLESS_MESSAGES):
            problems.append(message.text)

    def opened(**options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(30_000)
        context.set_default_navigation_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems
    assert hosts <= {f"127.0.0.1:{server.port}"}


@pytest.fixture
def page(open_page: Any) -> Any:
    """The page on a desktop, open and connected."""
    opened = open_page()
    opened.wait_for_selector(".welcome h1")
    return opened


def ask(page: Any, text: str, *, wait: bool = True) -> None:
    """Sends a message, and waits for the whole reply."""
    page.fill("#composer", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant.last")
    if wait:
        page.wait_for_selector(".message.assistant.last:not(.busy)")


def shows_reply(page: Any, text: str) -> None:
    """Waits until the last reply on the page has this text."""
    shown = "(text) => document.querySelector('.message.last .markdown')?.innerText.trim() === text"
    page.wait_for_function(shown, arg=text)


def last_reply(page: Any) -> str:
    """The text of the last reply on the page."""
    text: str = page.inner_text(".message.last .markdown")
    return text
