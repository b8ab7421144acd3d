"""Makes the pictures of docs/page.md: the page in headless Chromium, in front of the real server and model.

Run as `python docs/record_page.py` in an environment with Mnemos, its extra `serve`, Playwright and Chromium.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import uvicorn
from playwright.sync_api import Page, sync_playwright

from mnemos import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.run import address, listen
from mnemos.serve.settings import Settings

IMAGES = Path(__file__).with_name("images")
MODEL = "smollm2-135m"
SUBJECTS = ("the moon", "bread", "an echo", "winter", "a library", "the tide", "a bridge", "dust")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with InferenceEngine.from_pretrained(MODEL) as engine:
        listener = listen(Settings(port=0))
        server = uvicorn.Server(uvicorn.Config(app(engine, name=MODEL), log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            photograph(address(listener))
        finally:
            server.should_exit = True
            thread.join()


def photograph(url: str) -> None:
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or sys.exit("Chromium is not installed")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        light = browser.new_context(viewport={"width": 1200, "height": 750}).new_page()
        light.goto(url)
        light.wait_for_selector(".welcome strong")
        ask(light, "Write a Python function that counts the vowels of a string. Explain it in one sentence.")
        light.mouse.move(900, 30)
        shoot(light, "page")
        light.click("text=New conversation >> nth=0")
        ask(light, "Why is the sky blue?")
        light.click(".message.last .inside-button")
        light.click(".message.last .tokens .token >> nth=8")
        shoot(light, "page-inside")

        dark = browser.new_context(viewport={"width": 1200, "height": 750}, color_scheme="dark").new_page()
        dark.goto(url + "/#/compare")
        dark.fill("#composer", "Write a short poem about rain.")
        dark.keyboard.press("Enter")
        dark.wait_for_selector(".column .figures")
        dark.wait_for_selector(".column[aria-busy=true]", state="detached", timeout=120_000)
        shoot(dark, "page-compare")

        light.goto(url + "/#/engine")
        light.wait_for_selector(".engine-model")
        for requests in (1, 4, 16):
            with ThreadPoolExecutor(requests) as pool:
                answers = [pool.submit(one_request, url, n) for n in range(requests)]
                if requests == 16:
                    light.wait_for_timeout(4000)
                    shoot(light, "page-engine")
                for answer in answers:
                    answer.result()
            light.wait_for_timeout(2500)

        phone = browser.new_context(
            viewport={"width": 390, "height": 750}, has_touch=True, is_mobile=True, device_scale_factor=1.5
        ).new_page()
        phone.goto(url)
        phone.wait_for_selector(".welcome strong")
        phone.fill("#composer", "Give me three tips for a good night's sleep.")
        phone.click("[aria-label=Send]")
        phone.wait_for_selector(".message.assistant.last:not(.busy)", timeout=120_000)
        shoot(phone, "page-phone")
        browser.close()


def ask(page: Page, text: str) -> None:
    page.fill("#composer", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant.last:not(.busy)", timeout=120_000)


def one_request(url: str, number: int) -> None:
    message = f"Write a few lines about {SUBJECTS[number % len(SUBJECTS)]}."
    body = {"messages": [{"role": "user", "content": message}], "max_tokens": 200, "ignore_eos": True}
    httpx.post(url + "/v1/chat/completions", json=body, timeout=300).raise_for_status()


def shoot(page: Page, name: str) -> None:
    page.wait_for_timeout(700)
    page.screenshot(path=IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
