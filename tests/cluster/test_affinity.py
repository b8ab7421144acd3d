"""A conversation goes to the replica that has read it, and no replica is given far more than the others."""

from __future__ import annotations

import json

from mnemos.cluster import affinity
from mnemos.cluster.affinity import BLOCK, Affinity
from mnemos.cluster.prompts import prompt_of

IDLE = {"a": 0, "b": 0, "c": 0}
STORY = "".join(chr(97 + number % 23) for number in range(BLOCK * 5))


def test_a_longer_prompt_follows_the_one_that_it_continues() -> None:
    routes = Affinity()
    routes.note(STORY, "b")
    assert routes.ranked(STORY + " and so on", IDLE)[0] == "b"
    routes.note(STORY[: 2 * BLOCK], "c")
    assert routes.ranked(STORY, IDLE)[:2] == ["b", "c"]  # b has read more of it
    assert routes.ranked(STORY[: 2 * BLOCK] + "another", {"a": 0, "b": 3, "c": 1})[0] == "c"  # as much, and less to do


def test_what_nobody_has_read_goes_to_the_least_busy_in_turn() -> None:
    routes = Affinity()
    assert routes.ranked("new", {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]
    assert {routes.ranked("new", IDLE)[0] for _ in range(3)} == {"a", "b", "c"}


def test_a_replica_with_far_more_to_do_comes_last() -> None:
    routes = Affinity(slack=4)
    routes.note(STORY, "a")
    assert routes.ranked(STORY, {"a": 4, "b": 0})[0] == "a"
    assert routes.ranked(STORY, {"a": 5, "b": 0}) == ["b", "a"]


def test_a_replica_that_is_gone_is_forgotten() -> None:
    routes = Affinity()
    routes.note(STORY, "a")
    routes.note(STORY, "b")
    routes.forget("a")
    assert routes.ranked(STORY, {"b": 3, "a": 0})[0] == "b"
    assert routes.ranked(STORY, {"c": 0, "d": 0})[0] in "cd"


def test_memory_is_bounded_and_the_oldest_go_first(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(affinity, "MOST_PREFIXES", 8)
    routes = Affinity()
    routes.note(STORY, "a")
    routes.note(STORY[::-1], "b")
    assert routes.ranked(STORY[::-1], {"a": 0, "b": 1})[0] == "b"
    assert len(routes._replicas) == 8


def prompt(key: bytes = b"k", **body: object) -> str:
    return prompt_of([(b"authorization", key)], json.dumps(body).encode())


def test_prompts_of_a_conversation_begin_alike_whatever_else_a_request_says() -> None:
    first = {"role": "user", "content": "Hello " * 40}
    more = [first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]
    short, longer = prompt(messages=[first], max_tokens=3), prompt(temperature=1, messages=more)
    assert longer.startswith(short[:-1])
    assert not prompt(b"other", messages=more).startswith(short[:20])  # another key has another cache
    assert prompt(system="s", messages=[first]).startswith(prompt(system="s", messages=more)[:60])


def test_an_agents_changing_header_is_left_out() -> None:
    def system(number: int) -> list[dict[str, str]]:
        return [{"type": "text", "text": f"x-anthropic-billing-header: {number}"}, {"type": "text", "text": "Be kind."}]

    assert prompt(system=system(1), messages=["a"]) == prompt(system=system(2), messages=["a"])


def test_what_has_no_prompt_has_none() -> None:
    for body in (b"", b"[]", b"{", b"{}", b'"text"', b"[" * 100_000):
        assert prompt_of([], body) == ""


def test_requests_of_one_session_go_together() -> None:
    def of(session: str, text: str, key: bytes = b"") -> str:
        body = {"model": "m", "session": session, "messages": [{"role": "user", "content": text}]}
        return prompt_of([(b"authorization", key)] if key else [], json.dumps(body).encode())

    assert of("rainbow", "first") == of("rainbow", "second")
    assert len({of("rainbow", ""), of("other", ""), of("rainbow", "", b"key")}) == 3
    affinity = Affinity()
    affinity.note(of("rainbow", "first"), "b")
    assert affinity.ranked(of("rainbow", "second"), {"a": 0, "b": 1})[0] == "b"
