"""A conversation: streamed markdown, stopping, branches, settings, attached files, history, and failures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.serve.page.conftest import ask, last_reply, shows_reply
from tests.serve.page.scripted import Script, pieces

RICH = """A formula $e^{i\\pi} + 1 = 0$ and **bold** text.

| a | b |
| --- | ---: |
| 1 | 2 |

```python
def f(x):
    return x
```

\\[ x = \\frac{1}{2} \\]
"""


def test_a_reply_is_drawn_as_markdown(page: Any, script: Script) -> None:
    script.reply = RICH
    ask(page, "Show me everything")
    page.wait_for_selector(".message.last [data-math][data-display] .katex-display")
    assert page.locator(".message.last [data-math] .katex-mathml").count() == 2
    assert page.inner_text(".message.last strong") == "bold"
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.message.last td[align=right]')).textAlign") == "right"
    )
    page.wait_for_selector(".message.last .hljs-keyword")
    assert page.inner_text(".message.last .code-bar span") == "python"


def test_formulas_and_colours_are_loaded_only_when_they_appear(page: Any) -> None:
    ask(page, "Plain text, please")
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name).join()")
    assert "preact" in loaded
    assert "katex" not in loaded
    assert "highlight" not in loaded


def test_what_a_model_writes_is_never_more_than_text(page: Any, script: Script) -> None:
    script.reply = (
        "<img src=x onerror=\"document.title='hit'\"> <script>document.title='hit'</script>\n\n"
        "[a](javascript:document.title='hit') ![b](http://attacker.invalid/pixel.png) <iframe src='/'></iframe>\n\n"
        "<a href='http://attacker.invalid' style='position:fixed'>c</a> $\\href{javascript:alert(1)}{d}$"
    )
    ask(page, "Attack me")
    page.wait_for_selector(".message.last .katex")
    reply = ".message.last .markdown"
    assert page.locator(f"{reply} :is(img, script, iframe, [style*=fixed], [onerror], [href^=javascript])").count() == 0
    assert "<script>" in page.inner_text(reply)
    assert "hit" not in page.title()
    assert page.get_attribute(f"{reply} a", "rel") == "noopener noreferrer nofollow"


def test_stop_keeps_the_text_and_continue_goes_on(page: Any, script: Script) -> None:
    script.reply, script.pace = " ".join(f"word{n}" for n in range(300)), 0.02
    ask(page, "Go", wait=False)
    page.wait_for_function("() => document.querySelector('.message.last .markdown').innerText.includes('word3')")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    text = last_reply(page)
    assert script.reply.startswith(text)
    assert len(text) < len(script.reply)
    _until(lambda: script.cancelled == 1)
    script.pace = 0
    page.click(".message.last >> text=Continue")
    page.wait_for_selector(".message.last:not(.busy)")
    assert script.seen[-1]["continue_final_message"] is True
    assert script.seen[-1]["add_generation_prompt"] is False
    assert script.seen[-1]["messages"][-1]["role"] == "assistant"
    shows_reply(page, script.reply)


def test_a_lost_connection_keeps_the_text_and_offers_to_go_on(page: Any, script: Script) -> None:
    script.pace, script.drop = 0.02, 6
    ask(page, "Go")
    assert "The connection was lost" in page.inner_text(".message.last .error")
    kept = last_reply(page)
    assert kept
    assert script.reply.startswith(kept)
    script.drop = None
    page.click(".message.last .error >> text=Continue")
    shows_reply(page, script.reply)
    assert script.seen[-1]["messages"][-1]["content"].strip() == kept


def test_a_failure_is_told_and_tried_again(page: Any, script: Script) -> None:
    script.fail = 0
    ask(page, "Go")
    assert "the model failed" in page.inner_text(".message.last .error")
    script.fail = None
    page.click("text=Try again")
    page.wait_for_selector(".message.last .markdown >> text=scatters")
    assert page.locator(".message.last .branches").count() == 0, "an empty reply is no branch"


def test_a_refused_setting_is_told_in_the_servers_words(page: Any, script: Script) -> None:
    page.keyboard.press("Control+,")
    page.fill("#setting-temperature", "101")
    page.wait_for_selector(".panel >> text=At most 100")
    page.fill("#setting-temperature", "0.5")
    ask(page, "Go")
    assert script.seen[-1]["temperature"] == 0.5
    page.click("[aria-label='Reset temperature']")
    ask(page, "Go")
    assert "temperature" not in script.seen[-1]


def test_edits_and_other_tries_are_branches_that_stay(page: Any, script: Script) -> None:
    script.reply = "First."
    ask(page, "One")
    script.reply = "Second."
    page.click(".message.last [aria-label=Regenerate]")
    page.wait_for_selector(".message.last .markdown >> text=Second.")
    page.wait_for_selector(".message.last .branches >> text=2/2")
    page.click(".message.last [aria-label='Previous branch']")
    shows_reply(page, "First.")
    page.hover(".message.user")
    page.click(".message.user [aria-label=Edit]")
    page.fill("[aria-label='Edit the message']", "Two")
    script.reply = "Third."
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.last .markdown >> text=Third.")
    assert script.seen[-1]["messages"][-1] == {"role": "user", "content": "Two"}
    page.wait_for_selector(".message.user .branches >> text=2/2")
    page.reload()
    page.wait_for_selector(".message.last .markdown >> text=Third.")
    page.hover(".message.user")
    page.click(".message.user [aria-label='Previous branch']")
    shows_reply(page, "First.")
    page.wait_for_selector(".message.last .branches >> text=1/2")


def test_an_edited_reply_is_a_branch_that_is_sent_on(page: Any, script: Script) -> None:
    ask(page, "One")
    page.click(".message.last [aria-label=Edit]")
    page.fill("[aria-label='Edit the message']", "What I would have said")
    page.click("text=Save")
    page.wait_for_selector(".message.last .branches >> text=2/2")
    ask(page, "Two")
    assert script.seen[-1]["messages"][1] == {"role": "assistant", "content": "What I would have said"}


def test_a_message_is_deleted_with_what_follows(page: Any) -> None:
    ask(page, "One")
    ask(page, "Two")
    page.hover(".message.user >> nth=1")
    page.click(".message.user >> nth=1 >> [aria-label=Delete]")
    page.click("dialog >> text=Cancel")
    assert page.locator(".message").count() == 4
    page.click(".message.user >> nth=1 >> [aria-label=Delete]")
    page.click("dialog >> text=Delete >> nth=-1")
    page.wait_for_function("() => document.querySelectorAll('.message').length === 2")


def test_the_system_message_and_the_model_are_sent(page: Any, script: Script) -> None:
    page.click("[aria-label=Settings]")
    page.fill("#system", "Be brief.")
    page.select_option(".model-picker select", "qwen3-0.6b")
    ask(page, "Go")
    assert script.seen[-1]["model"] == "qwen3-0.6b"
    assert script.seen[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


def test_every_setting_that_the_server_describes_can_be_made(page: Any, script: Script) -> None:
    page.click("[aria-label=Settings]")
    page.fill("[aria-label='Find a setting']", "xtc")
    page.fill("#setting-xtc_probability", "0.5")
    page.fill("[aria-label='Find a setting']", "stop")
    page.fill("#setting-stop", "END\\n\nSTOP")
    page.fill("[aria-label='Find a setting']", "")
    page.click("summary:has-text('Stopping')")
    page.select_option("#setting-ignore_eos", "true")
    page.wait_for_selector("summary:has-text('Stopping') .badge >> text=2")
    ask(page, "Go")
    sent = script.seen[-1]
    assert (sent["xtc_probability"], sent["stop"], sent["ignore_eos"]) == (0.5, ["END\n", "STOP"], True)


def test_attached_files_are_sent_before_the_text(page: Any, script: Script, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("content of a")
    (tmp_path / "b.md").write_text("```\ncode\n```")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    page.set_input_files(".composer input[type=file]", [tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c.bin"])
    page.wait_for_selector("dialog >> text=c.bin")
    page.click("dialog >> text=OK")
    page.click("[aria-label='Remove a.txt']")
    ask(page, "Read it")
    assert script.seen[-1]["messages"][-1]["content"] == "b.md:\n````\n```\ncode\n```\n````\n\nRead it"
    page.wait_for_selector(".message.user .attachments >> text=b.md")


def test_reasoning_is_folded_away_and_not_sent_back(page: Any, script: Script) -> None:
    script.reasoning = "Let me think."
    ask(page, "Go")
    assert page.get_attribute(".message.last .reasoning", "open") is None
    page.click(".message.last .reasoning summary")
    assert "Let me think." in page.inner_text(".message.last .reasoning")
    ask(page, "And?")
    assert script.seen[-1]["messages"][1]["content"] == script.reply


def test_what_happens_before_the_first_token_is_told(page: Any, script: Script) -> None:
    script.wait, script.loaded = 3.0, False
    ask(page, "Go", wait=False)
    page.wait_for_selector("text=Loading the model")
    script.loaded = True
    page.wait_for_selector("text=Reading the prompt")
    page.wait_for_selector(".message.last:not(.busy)")
    assert "tokens/s" in page.inner_text(".message.last .figures")
    assert page.get_attribute(".meter", "aria-valuenow") == str(40 + len(pieces(script.reply)))


def test_the_limit_of_tokens_is_told(page: Any, script: Script) -> None:
    script.finish = "length"
    ask(page, "Go")
    assert "The limit of tokens was reached" in page.inner_text(".message.last")


def test_conversations_are_found_renamed_and_deleted(page: Any, script: Script) -> None:
    script.reply = "Rain comes from clouds."
    ask(page, "About the weather")
    page.keyboard.press("Control+Shift+O")
    script.reply = "Bread needs yeast."
    ask(page, "About baking")
    assert page.locator(".entry").count() == 2
    page.keyboard.press("Control+k")
    page.keyboard.type("clouds")  # said in a reply, not in a title
    page.wait_for_function("() => document.querySelectorAll('.entry').length === 1")
    assert page.inner_text(".entry a") == "About the weather"
    page.fill("#search", "")
    page.wait_for_function("() => document.querySelectorAll('.entry').length === 2")
    page.hover(".entry >> nth=0")
    page.click("[aria-label='More for About baking']")
    page.click("role=menuitem[name=Rename]")
    page.fill("dialog input", "Baking")
    page.keyboard.press("Enter")
    page.wait_for_selector(".entry >> text=Baking")
    page.reload()
    page.hover(".entry >> nth=0")
    page.click("[aria-label='More for Baking']")
    page.click("role=menuitem[name=Delete]")
    page.click("dialog >> text=Delete >> nth=-1")
    page.wait_for_function("() => document.querySelectorAll('.entry').length === 1")
    page.wait_for_selector(".welcome")
    page.click(".entry a")
    page.wait_for_selector(".message.last .markdown >> text=Rain")


def test_an_export_holds_all_branches_and_comes_back_whole(
    page: Any, open_page: Any, script: Script, tmp_path: Path
) -> None:
    script.reply = "First."
    ask(page, "One")
    script.reply = "Second."
    page.click(".message.last [aria-label=Regenerate]")
    page.wait_for_selector(".message.last .markdown >> text=Second.")
    page.wait_for_selector(".message.last:not(.busy)")
    with page.expect_download() as download:
        page.click("[aria-label='Export all conversations']")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    conversations = json.loads(file.read_text())["conversations"]
    assert sorted(m["content"] for m in conversations[0]["messages"] if m["role"] != "root") == [
        "First.",
        "One",
        "Second.",
    ]

    other = open_page()
    other.wait_for_selector(".welcome h1")
    other.set_input_files(".sidebar input[type=file]", file)
    other.click("dialog >> text=OK")
    other.click(".entry a")
    other.wait_for_selector(".message.last .markdown >> text=Second.")
    other.click(".message.last [aria-label='Previous branch']")
    shows_reply(other, "First.")
    other.click(".message.last .inside-button")
    other.wait_for_selector(".message.last .tokens .token")
    assert other.locator(".message.last .tokens .token").all_inner_texts() == ["First", "."]

    conversations[0]["messages"].pop()
    file.write_text(json.dumps({"format": "mnemos-conversations", "version": 1, "conversations": conversations}))
    other.set_input_files(".sidebar input[type=file]", file)
    other.wait_for_selector("dialog >> text=damaged")


def test_a_fork_is_a_conversation_of_its_own(page: Any, script: Script) -> None:
    ask(page, "One")
    page.click(".message.last [aria-label='New conversation from here']")
    page.wait_for_selector(".entry >> text=One (fork)")
    ask(page, "Two")
    assert [message["content"] for message in script.seen[-1]["messages"]] == ["One", script.reply, "Two"]
    page.click(".entry >> nth=1")
    page.wait_for_function("() => document.querySelectorAll('.message').length === 2")


def test_a_key_is_asked_for_once_and_kept(open_page: Any, script: Script) -> None:
    script.key = "secret"
    page = open_page()
    page.click("dialog >> text=Cancel")
    page.click(".banner >> text=Enter the key")
    page.fill("dialog input", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog >> text=does not accept")
    page.fill("dialog input", "secret")
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome strong >> text=smollm2-135m")
    ask(page, "Go")
    page.reload()
    page.wait_for_selector(".message.last .markdown")
    assert page.locator("dialog").count() == 0


def test_a_reply_goes_on_while_another_conversation_is_open(page: Any, script: Script) -> None:
    script.pace = 0.05
    ask(page, "One", wait=False)
    page.click(".new")
    page.wait_for_selector(".welcome h1")
    _until(lambda: script.running == 0)
    page.click(".entry a")
    shows_reply(page, script.reply)
    assert script.cancelled == 0


def test_a_reply_that_a_closed_page_cut_off_is_kept(page: Any, script: Script) -> None:
    script.reply, script.pace = "word " * 200, 0.02
    ask(page, "One", wait=False)
    page.wait_for_timeout(1600)  # the text is saved each second
    page.reload()
    page.wait_for_selector(".message.last .error >> text=closed before")
    assert last_reply(page).startswith("word word")


def _until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
