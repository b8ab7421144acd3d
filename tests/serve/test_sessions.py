"""Sessions over HTTP: `session` continues a conversation or a text, for its own tenant only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError
from mnemos.serve.application import app
from mnemos.serve.keys import Keys
from mnemos.serve.refusal import refusal_of
from mnemos.serve.settings import Settings
from tests.serve.running import events_of, running

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SYSTEM = {"role": "system", "content": "You answer in one short sentence."}
QUESTIONS = ["Name three colours of the rainbow.", "Which of them has the longest waves?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def own(smollm2: Path, folder: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(str(smollm2), context_length=1024, session_dir=folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(own: InferenceEngine) -> Iterator[httpx.Client]:
    with running(app(own, name="smollm2")) as client:
        yield client


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(client: httpx.Client, messages: list[Any], **fields: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"messages": messages, "max_tokens": 12, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_conversation_continues_with_new_messages_only(client: httpx.Client, own: InferenceEngine) -> None:
    first = chat(client, [SYSTEM, user(QUESTIONS[0])], session="rainbow")
    own.clear_prefix_cache()
    second = chat(client, [SYSTEM, user(QUESTIONS[1])], session="rainbow")  # the system message may be sent again
    everything = [SYSTEM, user(QUESTIONS[0]), first["choices"][0]["message"], user(QUESTIONS[1])]
    resent = chat(client, everything)
    assert second["choices"] == resent["choices"]
    assert second["usage"]["prompt_tokens"] == resent["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    other = client.post(CHAT, json={"messages": [user("Hi"), SYSTEM], "session": "rainbow", "max_tokens": 1})
    assert other.status_code == 200
    other = client.post(
        CHAT, json={"messages": [{"role": "system", "content": "Rhyme."}, user("Hi")], "session": "rainbow"}
    )
    assert other.status_code == 400 and "the session 'rainbow' began with another message" in other.text


def test_streams_responses_and_texts(client: httpx.Client) -> None:
    events = events_of(
        client, CHAT, {"messages": [user(QUESTIONS[0])], "session": "s", "stream": True, "max_tokens": 9}
    )
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    answer = client.post(RESPONSES, json={"input": QUESTIONS[1], "session": "s", "max_output_tokens": 9}).json()
    messages = [user(QUESTIONS[0]), {"role": "assistant", "content": said}, user(QUESTIONS[1])]
    assert (
        answer["output"][0]["content"][0]["text"]
        == chat(client, messages, max_tokens=9)["choices"][0]["message"]["content"]
    )
    one = client.post(COMPLETIONS, json={"prompt": "Once upon a time", "session": "t", "max_tokens": 5}).json()
    two = client.post(COMPLETIONS, json={"prompt": " there was", "session": "t", "max_tokens": 5}).json()
    whole = "Once upon a time" + one["choices"][0]["text"] + " there was"
    assert (
        two["choices"][0]["text"]
        == client.post(COMPLETIONS, json={"prompt": whole, "max_tokens": 5}).json()["choices"][0]["text"]
    )


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        (CHAT, {"messages": [user("a")], "session": "../x"}, "session is '../x'; it must be 1 to 100 of a-z"),
        (
            CHAT,
            {"messages": [user("a")], "session": "x", "n": 2, "temperature": 1},
            "a session continues with one result",
        ),
        (
            CHAT,
            {"messages": [user("a")], "session": "x", "truncate_prompt_tokens": 5},
            "session continues all of its text",
        ),
        (COMPLETIONS, {"prompt": ["a", "b"], "session": "x"}, "prompt has 2 prompts; a session continues with one"),
        (COMPLETIONS, {"prompt": "a", "echo": True, "session": "x"}, "echo is set; a session"),
        (RESPONSES, {"input": "a", "session": "x", "previous_response_id": "resp_1"}, "both"),
    ],
)
def test_what_a_session_cannot_do_is_refused(client: httpx.Client, path: str, body: Any, match: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400 and match in response.json()["error"]["message"]
    assert "x" not in [one["id"] for one in client.get("/v1/sessions").json()["data"]]


def test_each_tenant_has_its_own(own: InferenceEngine, folder: Path) -> None:
    def of(key: str) -> dict[str, Any]:
        return {"headers": {"authorization": f"Bearer {key}"}}

    own.session("secret").append([user("The word is cabbage.")])
    with running(app(own, name="smollm2", keys=Keys(["one", "two"]))) as client:
        body = {"messages": [user("Hello")], "session": "secret", "max_tokens": 2}
        for key in ("one", "two"):
            answer = client.post(CHAT, json=body, **of(key)).json()
            assert answer["usage"]["prompt_tokens"] == own.chat([user("Hello")], max_new_tokens=2).usage.prompt_tokens
        (listed,) = client.get("/v1/sessions", **of("one")).json()["data"]
        assert listed["id"] == "secret" and listed["turns"] == 1
        assert client.delete("/v1/sessions/secret", **of("one")).json()["deleted"] is True
        assert client.get("/v1/sessions", **of("one")).json()["data"] == []
        assert client.delete("/v1/sessions/secret", **of("one")).status_code == 404
        assert len(client.get("/v1/sessions", **of("two")).json()["data"]) == 1
    assert own.session("secret").messages == [user("The word is cabbage.")]


def test_damaged_and_busy_sessions_are_refused_and_can_be_forgotten(
    client: httpx.Client, own: InferenceEngine, folder: Path
) -> None:
    body = {"messages": [user("Hello")], "session": "hurt", "max_tokens": 2}
    assert client.post(CHAT, json=body).status_code == 200
    busy = own.session("hurt", tenant="default")
    turn = busy.submit_chat("Wait", max_new_tokens=800, ignore_eos=True)  # ends when it is dropped
    response = client.post(CHAT, json=body)
    assert response.status_code == 429 and "turn in progress" in response.text
    turn.drop()
    path = busy._file.path
    busy.close()
    path.write_bytes(b"nothing" + path.read_bytes())
    response = client.post(CHAT, json=body)
    assert response.status_code == 409 and response.json()["error"]["code"] == "session_unusable"
    assert str(folder) not in response.text
    assert client.delete("/v1/sessions/hurt").json()["deleted"] is True and not path.exists()
    assert client.post(CHAT, json=body).status_code == 200


def test_a_tenant_with_too_much_gets_no_turn(own: InferenceEngine) -> None:
    with running(app(own, name="smollm2", settings=Settings(session_bytes=1000))) as client:
        body = {"messages": [user("Hello")], "session": "large", "max_tokens": 2}
        codes = [client.post(CHAT, json=body).status_code for _ in range(2)]
        assert codes[-1] == 507
        client.delete("/v1/sessions/large")


def test_a_turn_whose_client_leaves_is_no_part_of_the_session(client: httpx.Client, own: InferenceEngine) -> None:
    body = {"messages": [user("Tell me a long story.")], "session": "left", "max_tokens": 600, "stream": True}
    assert client.post(CHAT, json={**body, "max_tokens": 2, "stream": False}).status_code == 200
    with client.stream("POST", CHAT, json=body) as response:
        for _ in zip(range(5), response.iter_lines(), strict=False):
            pass
    for _ in range(200):
        if not own.stats().running:
            break
        own.generate("wait", max_new_tokens=1)
    turns = [one["turns"] for one in client.get("/v1/sessions").json()["data"] if one["id"] == "left"]
    assert turns == [1]
    assert client.post(CHAT, json={**body, "max_tokens": 2, "stream": False}).status_code == 200


def test_a_repeated_request_is_answered_from_the_cache_and_marked(smollm2: Path) -> None:
    body = {"messages": [user(QUESTIONS[0])], "max_tokens": 6}
    with (
        InferenceEngine.from_pretrained(str(smollm2), context_length=512, response_cache=9) as engine,
        running(app(engine, name="smollm2", keys=Keys(["one", "two"]))) as client,
    ):
        keys = [{"authorization": f"Bearer {key}"} for key in ("one", "one", "two")]
        answers = [client.post(CHAT, json=body, headers=key) for key in keys]
    assert [answer.headers.get("x-mnemos-cached") for answer in answers] == [None, "exact", None]
    first, second, third = [answer.json()["choices"] for answer in answers]
    assert first == second == third


def test_a_response_of_a_session_is_continued_there(client: httpx.Client, own: InferenceEngine) -> None:
    def respond(text: str, **fields: Any) -> dict[str, Any]:
        answer = client.post(RESPONSES, json={"input": text, "max_output_tokens": 9, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    first = respond(QUESTIONS[0], session="chain")
    assert (first["session"], first["session_turn"]) == ("chain", 1)
    second = respond(QUESTIONS[1], previous_response_id=first["id"])
    assert (second["session"], second["session_turn"]) == ("chain", 2)
    other = respond("And the darkest?", previous_response_id=first["id"])  # the session has gone on: a fork
    assert other["session"].startswith("chain-") and other["session_turn"] == 2
    fork = own.session(other["session"], tenant="default")
    assert [message["role"] for message in fork.messages] == ["user", "assistant"] * 2
    messages = [user(QUESTIONS[0]), fork.messages[1], user("And the darkest?")]
    assert own.chat(messages, max_new_tokens=9).text == fork.messages[3]["content"]
    fork.close()
    assert client.delete("/v1/sessions/chain").status_code == 200
    gone = client.post(RESPONSES, json={"input": "Why?", "previous_response_id": second["id"]})
    assert gone.status_code == 400 and "rewound or forgotten" in gone.text
    assert "chain" not in [one["id"] for one in client.get("/v1/sessions").json()["data"]]


def test_a_turn_that_finds_no_room_on_the_disk_is_not_worth_repeating() -> None:
    try:
        raise CapacityError("/home/me/sessions/a: the turn cannot be stored") from OSError(
            28, "No space left on device"
        )
    except CapacityError as error:
        refusal = refusal_of(error)
    assert (refusal.status, refusal.code, refusal.retry_after) == (507, "no_room", None)
    assert "/home" not in refusal.message
