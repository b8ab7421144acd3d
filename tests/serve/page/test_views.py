"""Look inside, side by side, the engine; narrow windows, the keyboard alone, and a screen reader."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.serve.page.conftest import ask, shows_reply
from tests.serve.page.scripted import Script, pieces


def test_look_inside_colours_tokens_and_goes_on_with_another(page: Any, script: Script) -> None:
    ask(page, "Why?")
    assert script.seen[-1]["logprobs"] is True
    page.click(".message.last .inside-button")
    tokens = page.locator(".message.last .tokens .token")
    words = pieces(script.reply)
    page.wait_for_selector(".message.last .tokens .token")
    assert tokens.all_inner_texts() == words
    levels = [tokens.nth(i).get_attribute("class").split()[1] for i in range(3)]
    assert levels == ["p0", "p5", "p4"], "0.98, 0.009 and 0.05"
    tokens.nth(3).click()
    box = page.locator(".alternatives")
    assert box.locator("code").all_inner_texts() == ["·green", "·red", "·blue", "·cold", "·wide"]
    assert box.locator(".share").all_inner_texts()[:3] == ["42%", "21%", "17%"]
    box.locator("li", has_text="red").locator("button").click()
    page.wait_for_selector(".message.last:not(.busy) .tokens .forced")
    sent = script.seen[-1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "The sky is red"}
    assert sent["continue_final_message"] is True
    page.wait_for_selector(".message.last .branches >> text=2/2")
    assert page.inner_text(".message.last .token.forced") == " red"
    page.click(".message.last .inside-button")
    shows_reply(page, "The sky is red and so on.")
    page.click(".message.last [aria-label='Previous branch']")
    page.wait_for_selector(".message.last >> text=blue")


def test_a_reply_can_be_ended_where_its_end_was_an_alternative(page: Any, script: Script) -> None:
    script.others = (" green", "<|im_end|>")
    ask(page, "Why?")
    page.click(".message.last .inside-button")
    page.click(".message.last .tokens .token >> nth=3")
    page.click("text=End the reply here")
    page.wait_for_selector(".message.last .branches >> text=2/2")
    page.click(".message.last .inside-button")
    shows_reply(page, "The sky is")
    assert len(script.seen) == 1


def test_look_inside_by_keyboard(page: Any, script: Script) -> None:
    ask(page, "Why?")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("i")
    page.focus(".message.last .tokens .token >> nth=0")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "·blue, 17%"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Go on from here with ·green, 42%"
    page.keyboard.press("Escape")
    page.wait_for_selector(".alternatives", state="detached")
    assert page.evaluate("document.activeElement.dataset.index") == "3"


def test_without_probabilities_a_reply_says_so(page: Any, script: Script) -> None:
    page.click("[aria-label=Settings]")
    page.select_option("#page-Probabilities", "")
    ask(page, "Why?")
    assert "logprobs" not in script.seen[-1]
    page.click(".message.last .inside-button")
    page.wait_for_selector("text=came without probabilities")


def test_strategies_side_by_side_stream_at_once(page: Any, script: Script) -> None:
    page.click("text=Side by side >> nth=0")
    page.click("text=Add a column")
    page.select_option(".column >> nth=3 >> [aria-label=Strategy]", "Diverse beams")
    page.select_option(".column >> nth=1 >> [aria-label=Model]", "qwen3-0.6b")
    script.pace = 0.03
    page.fill("#composer", "Why?")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.column .markdown').length === 4")
    page.wait_for_selector(".column[aria-busy=true]", state="detached")
    assert script.most_running == 4
    settings = [
        {key: body.get(key) for key in ("model", "temperature", "num_beam_groups", "penalty_alpha")}
        for body in script.seen
    ]
    assert {"model": "smollm2-135m", "temperature": 0, "num_beam_groups": None, "penalty_alpha": None} in settings
    assert {"model": "qwen3-0.6b", "temperature": 0.8, "num_beam_groups": None, "penalty_alpha": None} in settings
    assert {"model": "smollm2-135m", "temperature": None, "num_beam_groups": 4, "penalty_alpha": None} in settings
    assert all("tokens/s" in text for text in page.locator(".column footer").all_inner_texts())
    page.click(".column >> nth=2 >> [aria-label='Continue as a conversation']")
    page.wait_for_selector(".message.last .markdown >> text=scatters")
    ask(page, "And?")
    assert script.seen[-1]["penalty_alpha"] == 0.6
    assert script.seen[-1]["messages"][0]["content"] == "Why?"


def test_a_column_has_settings_of_its_own(page: Any, script: Script) -> None:
    page.click("text=Side by side >> nth=0")
    page.click(".column >> nth=0 >> [aria-label='Settings of this column']")
    page.fill("dialog [id$=-seed]", "7")
    page.click("dialog >> text=Done")
    page.fill("#composer", "Why?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".column:first-child .figures")
    assert sorted(body.get("seed", 0) for body in script.seen) == [0, 0, 7]
    page.reload()
    assert page.input_value(".column >> nth=0 >> [aria-label=Strategy]") == "Own settings"


def test_the_engine_is_seen_at_work(page: Any, script: Script) -> None:
    page.click("text=The engine >> nth=0")
    page.wait_for_selector(".engine-model >> text=idle")
    script.pace = 0.1
    page.click("text=Send 8 requests at once")
    page.wait_for_selector(".engine-model >> text=working")
    page.wait_for_selector(".figure:has-text('Running') >> text=8")
    assert page.locator(".chart path.line").count() >= 4
    assert "running" in page.get_attribute(".chart svg >> nth=0", "aria-label")
    page.wait_for_selector(".engine-model >> text=idle")
    assert len(script.seen[-1]["prompt"]) == 8


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_cut_off_in_a_narrow_window(open_page: Any, script: Script, width: int) -> None:
    script.reply = (
        "A long_identifier_"
        + "x" * 200
        + "\n\n| a | b | c |\n| - | - | - |\n| "
        + " | ".join(["wide " * 20] * 3)
        + " |"
    )
    page = open_page(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    page.wait_for_selector(".welcome h1")
    page.fill("#composer", "Why?")
    page.click("[aria-label=Send]")
    page.wait_for_selector(".message.last:not(.busy)")
    page.click(".message.last .inside-button")
    page.click(".message.last .tokens .token >> nth=1")
    _fits(page, ".alternatives", width)
    page.click(".alternatives [aria-label=Close]")
    page.click("[aria-label=Settings]")
    _fits(page, ".panel", width)
    page.click("[aria-label='Close the settings']")
    for view, selector in (("compare", ".column"), ("engine", ".engine-model"), ("", ".welcome")):
        page.click("[aria-label='Show the conversations']")
        _fits(page, ".sidebar", width)
        page.click(f".sidebar a[href='#/{view}'] >> nth=-1")
        page.wait_for_selector(selector)
        page.wait_for_selector(".sidebar", state="detached")  # the drawer closes when something was chosen
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def _fits(page: Any, selector: str, width: int) -> None:
    box = page.locator(selector).bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_enter_makes_a_new_line_on_a_touch_screen(open_page: Any, script: Script) -> None:
    page = open_page(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    page.wait_for_selector(".welcome h1")
    page.click("#composer")
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    assert page.input_value("#composer") == "one\n"
    assert not script.seen


def test_by_keyboard_alone(page: Any, script: Script) -> None:
    page.keyboard.press("Escape")  # leaves the message field
    page.keyboard.press("/")
    page.keyboard.type("One")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.last:not(.busy) .markdown")
    page.keyboard.press("Alt+ArrowUp")
    page.keyboard.press("r")
    page.wait_for_selector(".message.last:not(.busy) .branches")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.message.last .branches').innerText === '1/2'")
    page.keyboard.press("/")
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" more")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.user >> text=One more")
    page.wait_for_selector(".message.last:not(.busy) .markdown")
    page.keyboard.press("Control+b")
    page.wait_for_selector(".sidebar", state="detached")
    page.keyboard.press("Control+b")
    page.keyboard.press("Control+,")
    page.wait_for_selector("#system:focus")
    page.keyboard.press("Escape")
    page.wait_for_selector(".panel", state="detached")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("dialog >> text=Keyboard shortcuts")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


def test_everything_that_can_be_used_has_a_name_and_can_be_reached(page: Any) -> None:
    ask(page, "Why?")
    page.click("[aria-label=Settings]")
    nameless = """() => [...document.querySelectorAll("button, a[href], input:not([hidden]), select, textarea")]
        .filter((one) => !(one.getAttribute("aria-label") || one.innerText?.trim() || one.labels?.length))
        .map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    unreachable = """() => [...document.querySelectorAll("button:not(:disabled), a[href], select")]
        .filter((one) => one.tabIndex < 0).length"""
    assert page.evaluate(unreachable) == 0


def test_a_screen_reader_hears_a_reply_once(page: Any, script: Script) -> None:
    page.evaluate("""() => {
        window.said = [];
        const region = document.querySelector("[role=status]");
        const heard = new MutationObserver(() => window.said.push(region.textContent));
        heard.observe(region, { childList: true, subtree: true, characterData: true });
    }""")
    script.pace = 0.01
    ask(page, "Why?")
    page.wait_for_function("() => window.said.at(-1)?.startsWith('Reply complete')")
    said = page.evaluate("window.said")
    assert said == ["Reply started", f"Reply complete: {script.reply}"]
    assert page.locator("[aria-live=polite] .message, [role=log]").count() == 0


def test_a_burst_of_tokens_is_drawn_at_most_once_a_frame(page: Any, script: Script) -> None:
    script.reply = "word " * 400
    page.evaluate("""() => {
        window.frames_ = 0;
        window.changes = 0;
        const count = () => { window.frames_ += 1; requestAnimationFrame(count); };
        requestAnimationFrame(count);
        let drawn = null;
        new MutationObserver(() => {
            const block = document.querySelector(".message.last .block");
            if (block && block.firstChild !== drawn) { drawn = block.firstChild; window.changes += 1; }
        }).observe(document.getElementById("app"), { childList: true, subtree: true });
    }""")
    ask(page, "Why?")
    page.wait_for_function("() => document.querySelector('.message.last .markdown').innerText.trim().length === 1999")
    assert 0 < page.evaluate("window.changes") <= page.evaluate("window.frames_")
    assert page.evaluate("window.changes") < 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_chosen(open_page: Any, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.wait_for_selector(".welcome h1")
    assert _contrast(page, ".welcome h1") >= 7
    assert _contrast(page, ".welcome .help") >= 4.5
    other = {"light": "dark", "dark": "light"}[scheme]
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("[aria-label=Settings]")
    page.select_option("#page-Appearance", other)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    page.wait_for_selector(".welcome h1")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert _contrast(page, ".welcome .help") >= 4.5


def _contrast(page: Any, selector: str) -> float:
    """The contrast of a text with the page's background, as WCAG defines it."""
    colours = """(selector) => [getComputedStyle(document.querySelector(selector)).color,
        getComputedStyle(document.body).backgroundColor]"""
    ink, paper = ([int(part) for part in text[4:-1].split(",")] for text in page.evaluate(colours, selector))

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else math.pow((c / 255 + 0.055) / 1.055, 2.4) for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


def test_a_long_conversation_draws_its_end_first(page: Any, tmp_path: Any) -> None:
    page.evaluate("""async () => {
        const chats = await import("/page/js/chats.js");
        const conversation = chats.newConversation({ model: "smollm2-135m" });
        let parent = conversation.record.id;
        for (let i = 0; i < 500; i++) {
            const role = i % 2 ? "assistant" : "user";
            parent = chats.add(conversation, { parent, role, content: `Text ${i}`, finish: "stop" }).id;
        }
        location.hash = `#/chat/${conversation.record.id}`;
    }""")
    page.wait_for_selector(".message >> text='Text 499'")
    assert page.locator(".message").count() == 40
    page.click(".earlier")
    page.wait_for_function("() => document.querySelectorAll('.message').length >= 80")
    assert page.locator(".message.last >> text='Text 499'").count() == 1


def test_a_server_that_does_not_answer_is_told_and_found_again(page: Any) -> None:
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.wait_for_selector(".banner >> text=does not answer")
    page.unroute("**/v1/models")
    page.wait_for_selector(".banner", state="detached")
    page.wait_for_selector(".welcome strong >> text=smollm2-135m")
