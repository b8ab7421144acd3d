"""API keys: where they come from, and what their callers may use."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import httpx
import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from mnemos.serve.application import app
from mnemos.serve.keys import ANYONE, Caller, Keys, Usage, Window, read_keys
from mnemos.serve.refusal import Refusal
from tests.serve.running import running

PATH = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Tell me about France. " * 40}], "max_tokens": 2}


def as_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_without_keys_everyone_may_ask() -> None:
    assert Keys().caller(None) is ANYONE and not Keys()


def test_a_file_holds_keys_or_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# for the team\nfirst\nsha256:{hashlib.sha256(b'second').hexdigest()}\n")
    keys = Keys(path=path)
    names = {caller.name for key in ("first", "second") if (caller := keys.caller(key)) is not None}
    assert len(names) == 2 and keys.caller("third") is None and keys.caller(None) is None


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("old\n")
    keys = Keys(path=path)
    path.write_text("newer\n")
    monkeypatch.setattr("mnemos.serve.keys.RELOAD", 0.0)
    assert keys.caller("old") is None and keys.caller("newer") is not None
    path.write_text("")
    os.utime(path, (time.time(), time.time() + 5))
    assert keys.caller("newer") is not None  # a broken file locks nobody out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[a]\nkey = 'x'\nsha256 = 'y'", "either"),
        ("[a]\ntenant = 'x'", "either"),
        ("[a]\nkey = 'x'\nconcurrent = 0", "a.concurrent is 0"),
        ("[a]\nkey = 'x'\ntenannt = 'y'", "did you mean tenant"),
        ("[a]\nsha256 = 'abc'", "64"),
        ("a = 5", "not a table"),
        ("[a", "keys.toml"),
        ("", "no keys"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_keys(path)


def test_limits_are_those_of_the_last_minute() -> None:
    now = [0.0]
    usage = Usage(Window(lambda: now[0]), Window(lambda: now[0]))
    caller = Caller("a", "a", "a", requests_per_minute=2, tokens_per_minute=100, usage=usage)
    caller.enter()
    caller.leave(60)
    now[0] = 30.0
    caller.enter()
    caller.leave(60)
    with pytest.raises(Refusal, match="2 requests a minute") as caught:
        caller.enter()
    assert caught.value.status == 429 and caught.value.retry_after == 30
    now[0] = 61.0  # the first has been forgotten
    caller.enter()
    assert caller.headers()["x-ratelimit-remaining-tokens"] == "40"
    caller.leave(50)
    now[0] = 89.0
    busy = Caller("a", "a", "a", tokens_per_minute=100, concurrent=1, usage=caller.usage)
    with pytest.raises(Refusal, match="100 tokens a minute"):
        busy.enter()
    now[0] = 91.0
    busy.enter()
    with pytest.raises(Refusal, match="at the same time"):
        busy.enter()


def test_embeddings_and_decisions_use_tokens_too(engine: InferenceEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[one]\nkey = 'k1'\ntokens_per_minute = 1000\n")
    left = "x-ratelimit-remaining-tokens"
    question = {"type": "predicate", "instructions": "Is it late?"}
    with running(app(engine, keys=Keys(path=path))) as client:
        embedded = client.post("/v1/embeddings", json={"input": ["one two three", "four"]}, headers=as_key("k1"))
        assert embedded.headers[left] == "1000"
        decided = client.post("/v1/decisions", json={"input": "x", "questions": [question]}, headers=as_key("k1"))
        used = embedded.json()["usage"]["prompt_tokens"]
        assert int(decided.headers[left]) == 1000 - used < 1000
        after = client.get("/v1/models", headers=as_key("k1"))
        assert int(after.headers[left]) == 1000 - used - decided.json()["usage"]["input_tokens"]


@pytest.mark.slow
def test_callers_do_not_see_each_others_cache(engine: InferenceEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[one]\nkey = 'k1'\nrequests_per_minute = 3\n[two]\nkey = 'k2'\n")

    def cached(client: httpx.Client, key: str, salt: str | None = None) -> int:
        response = client.post(PATH, json={**LONG, "cache_salt": salt}, headers=as_key(key))
        assert response.status_code == 200
        return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    with running(app(engine, keys=Keys(path=path))) as client:
        assert cached(client, "k1") == 0 and cached(client, "k1") > 0
        assert cached(client, "k2") == 0
        assert cached(client, "k1", "other") == 0
        refused = client.post(PATH, json=LONG, headers=as_key("k1"))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
    with running(app(engine, keys=Keys(["k1", "k2"], share_cache=True))) as client:
        assert cached(client, "k1", "s") == 0 and cached(client, "k2", "s") > 0
