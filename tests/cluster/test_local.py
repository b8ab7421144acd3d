"""`mnemos serve --replicas N`: several processes answer as one server, and a lost one is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mnemos.cluster.local import shares_of
from tests.serve.running import events_of

PATH = "/v1/chat/completions"


def test_each_replica_has_its_share_of_the_cores() -> None:
    assert shares_of([0, 1, 2, 3, 4], 2) == [{0, 1}, {2, 3, 4}]
    assert shares_of([4, 6], 2) == [{4}, {6}]
    assert shares_of([3, 5], 3) == [{3}, {3}, {5}]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    words = ["serve", f"smollm2={smollm2}", "--replicas", "2", "--port", "0", "--context-length", "1024"]
    with subprocess.Popen([sys.executable, "-m", "mnemos", *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "ready at" in line)
        yield process, line.split("ready at ")[1].split()[0]
        process.terminate()


@pytest.fixture
def client(server: tuple[subprocess.Popen[str], str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], timeout=60) as client:
        wait_for(lambda: set(metric(client, "mnemos_requests_running")) == {"0", "1"})
        yield client


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str) -> dict[str, float]:
    """A metric's value for each replica whose model is loaded."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {one.labels["replica"]: one.value for family in families for one in family.samples if one.name == name}


@pytest.mark.slow
def test_replicas_answer_as_one_server(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "smollm2"
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
    events = events_of(client, PATH, body)
    assert events[-1] == "[DONE]" and len(events) > 5
    stored = client.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 4}).json()["id"]
    for _ in range(4):  # whichever replica is asked
        assert client.get(f"/v1/responses/{stored}").json()["id"] == stored


@pytest.mark.slow
def test_a_conversation_meets_its_cache_and_others_are_spread(client: httpx.Client) -> None:
    before = metric(client, "mnemos_requests_submitted_total")
    for number in range(4):
        messages = [{"role": "user", "content": f"Conversation {number}: " + f"word{number} " * 60}]
        cached = []
        for _ in range(3):
            answer = client.post(PATH, json={"messages": messages, "max_tokens": 4}).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        assert cached[1] >= 128 and cached[2] >= 128
    after = metric(client, "mnemos_requests_submitted_total")
    assert all(after[name] > before[name] for name in after)


@pytest.mark.slow
def test_a_client_that_leaves_leaves_its_replica(client: httpx.Client) -> None:
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_for(lambda: sum(metric(client, "mnemos_requests_cancelled_total").values()) == 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_a_lost_replica_is_replaced_and_a_stopped_server_leaves_none(
    server: tuple[subprocess.Popen[str], str], client: httpx.Client
) -> None:
    def replicas() -> list[int]:
        children = Path(f"/proc/{server[0].pid}/task/{server[0].pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    first = replicas()
    os.kill(first[0], signal.SIGKILL)
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    wait_for(lambda: client.post(PATH, json=body).status_code == 200 and len(set(replicas()) - {first[0]}) == 2)
    wait_for(lambda: len(metric(client, "mnemos_requests_running")) == 2)
    both = replicas()
    server[0].terminate()
    assert server[0].wait(20) in (0, 143)
    assert not [child for child in both if Path(f"/proc/{child}").exists()]
