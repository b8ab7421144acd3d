"""A model through `mnemos serve` compared with the engine alone: rates, delays, and what the server costs.

The server is a process of its own. The client does not parse what it receives before the last stream has ended, so that
it leaves the cores to the server.
"""

from __future__ import annotations

import json
import math
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mnemos.bench.process import measure_start
from mnemos.bench.results import Result
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import MnemosError

PATH = "/v1/completions"
STREAMS = (1, 32)
TOKENS = 128
ROUNDS = {1: 8, 32: 3}
START_SECONDS = 120.0
IDLE_SECONDS = 3.0
_WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "bridge",
    "market",
    "window",
    "silver",
    "road",
    "music",
]


@dataclass(frozen=True)
class Streamed:
    """What a client saw of streams that began together. seconds: until the last end; first: to each first event."""

    seconds: float
    first: list[float]
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens/s of all streams together."""
        return self.tokens / self.seconds


def stream_all(address: str, bodies: Sequence[dict[str, Any]], path: str = PATH, timeout: float = 600.0) -> Streamed:
    """Sends all requests at once, each on a connection of its own, and reads their streams to the end.

    address: such as http://127.0.0.1:8000. MnemosError if one does not end with its number of tokens.
    """
    host = urlsplit(address).netloc
    streams: list[_Stream] = []
    with selectors.DefaultSelector() as selector:
        try:
            for body in bodies:
                content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
                head = (
                    f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
                )
                streams.append(_Stream(_connect(address, timeout), head.encode() + content))
            start = time.perf_counter()
            for stream in streams:
                stream.socket.sendall(stream.request)
                stream.socket.setblocking(False)
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            left = len(streams)
            while left:
                ready = selector.select(timeout)
                if not ready:
                    raise MnemosError(f"the server at {address} sent nothing for {timeout:g} seconds")
                for key, _ in ready:
                    stream = key.data
                    if stream.read():
                        selector.unregister(stream.socket)
                        left -= 1
            seconds = time.perf_counter() - start
        finally:
            for stream in streams:
                stream.socket.close()
    return Streamed(seconds, sorted(s.first - start for s in streams), sum(stream.tokens() for stream in streams))


def _connect(address: str, timeout: float) -> socket.socket:
    place = urlsplit(address)
    return socket.create_connection((place.hostname or "", place.port or 80), timeout)


class _Stream:
    """One request's connection and what came over it."""

    def __init__(self, connected: socket.socket, request: bytes) -> None:
        self.socket = connected
        self.request = request
        self.first = math.nan  # when the first event came
        self._parts: list[bytes] = []

    def read(self) -> bool:
        """Takes what has arrived; True at the end of the stream."""
        part = self.socket.recv(1 << 18)
        if math.isnan(self.first) and b"data:" in part:
            self.first = time.perf_counter()
        self._parts.append(part)
        return not part or b"[DONE]" in part

    def tokens(self) -> int:
        """The number of generated tokens, from the usage at the end. MnemosError without one."""
        received = b"".join(self._parts)
        lines = [line for line in received.splitlines() if line.startswith(b"data: {") and b'_tokens"' in line]
        if not lines or b"data: [DONE]" not in received:
            shown = received[-300:].decode("utf-8", "replace")
            raise MnemosError(f"a stream ended without its number of tokens; the last of it: {shown!r}")
        return int(json.loads(lines[-1][6:])["usage"]["completion_tokens"])


class ServerProcess:
    """`mnemos serve` in a process. address: where it listens; started: seconds until its model was loaded."""

    def __init__(self, process: subprocess.Popen[str], address: str, started: float) -> None:
        self.address = address
        self.started = started
        self._process = process

    def processor_seconds(self) -> float:
        """What it has used so far; nan where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> float:
        """Its most resident memory; nan where the system does not tell."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return math.nan
        return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@contextmanager
def served(model: str, *options: str) -> Iterator[ServerProcess]:
    """Starts the server and ends it. MnemosError with its last words if it does not become ready."""
    command = [sys.executable, "-m", "mnemos", "serve", f"model={model}", "--port", "0", *options]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            _, ready, rest = line.partition("ready at ")
            if ready:
                address = rest.split()[0]
                break
        else:
            raise MnemosError(f"the server did not start: {''.join(said)[-2000:].strip()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log would fill the pipe
        while _status(address, "/ready") != 200:
            if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise MnemosError(f"the server did not load {model} within {START_SECONDS:g} seconds")
            time.sleep(0.002)
        yield ServerProcess(process, address, time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait()


def _status(address: str, path: str) -> int:
    """The status of a GET request."""
    host = urlsplit(address).netloc
    with _connect(address, 10) as connected:
        connected.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(connected.recv(64).split()[1])


def measure_server(path: Path, backend: str) -> Iterator[Result]:
    """The server's figures, each beside the engine's own from the same run.

    Rates have the engine's own as their limit; TOKENS tokens a stream, greedy, prompts that no cache knows.
    """
    generate = measure_start(str(path), backend)
    with served(str(path), f"--backend={backend}") as server:
        yield Result("ready_after", server.started - generate.seconds, "s")
        stream_all(server.address, requests(random.Random(-1), 1))
        yield Result("memory_added", (server.peak_bytes() - generate.peak_bytes) / (1 << 20), "MB")
        before = server.processor_seconds()
        time.sleep(IDLE_SECONDS)
        yield Result("idle", 100 * (server.processor_seconds() - before) / IDLE_SECONDS, "% of a core")
        with InferenceEngine.from_pretrained(path, backend=backend) as engine:
            for streams in STREAMS:
                yield from _compare(server, engine, streams)


def _compare(server: ServerProcess, engine: InferenceEngine, streams: int) -> Iterator[Result]:
    """Rates and the delay to the first token of so many streams, in turns, as medians."""
    alone: list[Streamed] = []
    through: list[Streamed] = []
    for number in range(ROUNDS[streams] + 1):
        bodies = requests(random.Random(f"{streams} {number}"), streams)
        prompts = [str(body["prompt"]) for body in bodies]
        for turn in range(2):
            if (number + turn) % 2:
                alone.append(_run_alone(engine, prompts))
            else:
                through.append(stream_all(server.address, bodies))
    alone, through = alone[1:], through[1:]  # the first round warms up
    rate = statistics.median(one.rate for one in through)
    ratio = statistics.median(one.rate / other.rate for one, other in zip(through, alone, strict=True))
    yield Result(f"stream{streams}", rate, "tokens/s", rate / ratio, "the engine alone")
    if streams == 1:
        delays = [one.first[0] - other.first[0] for one, other in zip(through, alone, strict=True)]
        yield Result("ttft_added", 1000 * statistics.median(delays), "ms")


def _run_alone(engine: InferenceEngine, prompts: list[str]) -> Streamed:
    start = time.perf_counter()
    handles = [engine.submit(prompt, max_new_tokens=TOKENS, ignore_eos=True, temperature=0) for prompt in prompts]
    timings = [handle.result().timings for handle in handles]
    seconds = time.perf_counter() - start
    return Streamed(seconds, sorted(one.tokens[0] - start for one in timings), sum(len(one.tokens) for one in timings))


def requests(generator: random.Random, count: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Bodies of requests for so many tokens after about forty words that are unlike those of other requests."""
    prompts = [" ".join(generator.choices(_WORDS, k=40)) for _ in range(count)]
    fixed = {"model": "model", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return [{**fixed, "prompt": prompt} for prompt in prompts]
