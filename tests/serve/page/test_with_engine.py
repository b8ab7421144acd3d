"""The page in front of the real server and a real model."""

from __future__ import annotations

from typing import Any

import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from tests.serve.page.conftest import ask
from tests.serve.running import running


@pytest.mark.slow
def test_a_newcomers_first_minutes(chromium: Any, engine: InferenceEngine) -> None:
    with running(app(engine, name="smollm2")) as client, chromium.new_context() as context:
        problems: list[str] = []
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(str(client.base_url))
        page.wait_for_selector(".welcome strong >> text=smollm2")
        page.click("[aria-label=Settings]")
        page.fill("#setting-temperature", "0")
        page.fill("#setting-max_new_tokens", "24")
        ask(page, "What is the capital of France?")
        assert "Paris" in page.inner_text(".message.last .markdown")
        assert page.get_attribute(".meter", "aria-valuemax") == "2048"

        page.click(".message.last .inside-button")
        tokens = page.locator(".message.last .tokens .token")
        page.wait_for_selector(".message.last .tokens .token")
        before = tokens.all_inner_texts()
        assert "".join(before).strip().startswith("The capital of France is Paris")
        tokens.nth(4).click()
        alternative = page.locator(".alternatives li:not(.own)").first
        alternative.locator("button").click()
        page.wait_for_selector(".message.last .branches >> text=2/2")
        page.wait_for_selector(".message.last:not(.busy) .tokens")
        after = tokens.all_inner_texts()
        assert after[:4] == before[:4] and after[4] != before[4] and len(after) > 5

        page.click("text=Side by side >> nth=0")
        page.fill("#composer", "Say hello.")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.column .figures').length >= 3")
        page.wait_for_selector(".column[aria-busy=true]", state="detached")
        assert page.locator(".column .error").count() == 0

        page.click("text=The engine >> nth=0")
        page.click("text=Send 8 requests at once")
        page.wait_for_selector(".engine-model .figure:has-text('Running') >> text=8")
        page.wait_for_selector(".engine-model >> text=idle")

        strategies = page.evaluate("async () => (await import('/page/js/views/compare.js')).STRATEGIES")
        for fields in strategies.values():
            GenerationConfig(**fields, logprobs=8)  # raises ConfigError if the engine would refuse it
        assert not problems
