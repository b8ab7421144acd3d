"""Many streams at once, a third of them cut off: everybody else gets everything, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from mnemos.bench.server import served
from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.state import State
from tests.engine.toys import ToyModel
from tests.serve.running import running

PROBE = """
import http.client, json, sys, threading, time
host, ended, seconds = sys.argv[1].removeprefix("http://"), threading.Event(), []
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
connection = http.client.HTTPConnection(host)
print("ready", flush=True)
while not ended.wait(0.02):
    began = time.perf_counter()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"healthy"}'
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


async def stream(address: str, tokens: int, patience: float | None) -> str:
    """Asks for a stream of so many tokens and reads it to its end, or leaves after `patience` seconds."""
    host, port = address.removeprefix("http://").split(":")
    fields = {"model": "model", "prompt": [1, 2, 3, 4], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(fields)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        content = await asyncio.wait_for(reader.read(), patience)
    except asyncio.TimeoutError:
        writer.transport.abort()
        return "cut"
    finally:
        writer.close()
    whole = b'"finish_reason":"length"' in content and b"data: [DONE]" in content
    return "whole" if whole else content[-200:].decode()


async def crowd(address: str, count: int, tokens: int, longest_patience: float) -> Counter[str]:
    """What became of so many streams at once, of which every third has a random patience."""
    generator = random.Random(0)
    patience = [generator.uniform(0, longest_patience) if n % 3 == 0 else None for n in range(count)]
    return Counter(await asyncio.gather(*(stream(address, tokens, one) for one in patience)))


def eventually(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether it becomes true before so much time has passed: a server notices that a client has left soon after."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_nothing_is_left_behind_by_a_crowd() -> None:
    with InferenceEngine(ToyModel(context_length=512), prefix_cache=False, max_sequences=4) as engine:
        application = app(engine, name="model")
        state: State = application.app.inner.state.server  # type: ignore[attr-defined]
        with running(application) as client:
            ends = asyncio.run(crowd(str(client.base_url), 60, 24, 0.1))
            assert ends["whole"] >= 40 and ends["whole"] + ends["cut"] == 60
            assert eventually(lambda: application.active == 0)
            assert eventually(lambda: (stats := engine.stats()).finished + stats.cancelled == stats.submitted)
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.pages_used, stats.failed) == (0, 0, 0, 0)
            assert stats.finished >= ends["whole"]
            assert state.catalogue.models[0].users == 0


@pytest.mark.slow
def test_a_thousand_streams_at_once(smollm2: Path) -> None:
    with served(str(smollm2)) as server:
        memory = []
        for _ in range(2):
            probe = subprocess.Popen(
                [sys.executable, "-c", PROBE, server.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert probe.stdout is not None and probe.stdout.readline() == "ready\n"
            began = time.perf_counter()
            ends = asyncio.run(crowd(server.address, 1000, 4, 10.0))
            took = time.perf_counter() - began
            seconds = sorted(json.loads(probe.communicate("")[0]))
            assert ends["whole"] >= 666 and ends["whole"] + ends["cut"] == 1000
            assert seconds[len(seconds) * 95 // 100] < took / 50  # the slower the machine, the longer both
            assert eventually(lambda: figure(server.address, "mnemos_requests_running") == 0)
            assert figure(server.address, "mnemos_requests_waiting") == 0
            assert figure(server.address, "mnemos_cache_pages_used") == 0
            assert figure(server.address, "mnemos_requests_failed_total") == 0
            memory.append(server.peak_bytes())
        assert memory[1] - memory[0] < 32 << 20


def figure(address: str, name: str) -> float:
    """A figure of the server's metrics."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + "{")))
