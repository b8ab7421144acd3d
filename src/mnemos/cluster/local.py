"""Replicas on this machine: server processes on a share of the cores each, behind one address.

One engine uses all cores that share a memory; replicas pay off where there are several memories (NUMA), or where a
model is too small to keep all cores busy.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import Message

from mnemos.cluster.affinity import Affinity
from mnemos.cluster.front import Forwarded
from mnemos.cluster.http import send_on
from mnemos.errors import ConfigError, MnemosError
from mnemos.serve.refusal import Refusal

logger = logging.getLogger("mnemos.serve")
PAUSE = 5.0  # seconds between two starts of one replica
Target = Callable[..., object]


@dataclass
class Replica:
    """A server process. active: requests that it is answering."""

    name: str
    path: str
    cores: set[int]
    process: BaseProcess | None = None
    started: float = 0.0
    active: int = 0

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.process is not None and self.process.is_alive()

    def answers(self) -> bool:
        """Whether its socket takes connections."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.path) == 0


class Replicas:
    """Server processes that are started again when they end. A context manager, which ends them.

    target: a function of a module that runs a server until a signal; it is called in each process with the path of the
    UNIX socket to listen at, a path that all replicas share for stored responses, and `arguments`, which are pickled.
    """

    def __init__(self, count: int, target: Target, *arguments: Any) -> None:
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigError(
                f"replicas is {count}, and this system has no UNIX sockets to reach them by; leave it out"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="mnemos-")  # nobody else may enter it
        self._target = target
        self._arguments = arguments
        self._affinity = Affinity()
        shares = shares_of(usable_cores(), count)
        self.replicas = [
            Replica(str(number), str(Path(self._folder.name) / f"{number}.sock"), cores)
            for number, cores in enumerate(shares)
        ]

    def __enter__(self) -> Replicas:
        """Starts the first replica, and once it listens the others: whatever has to be fetched is fetched once.

        MnemosError if the first one ends before.
        """
        first, *others = self.replicas
        self._start(first)
        while not first.answers():
            if not first.alive:
                self._folder.cleanup()
                raise MnemosError("the first replica ended before it could answer; its own message says why")
            time.sleep(0.01)
        for replica in others:
            self._start(replica)
        return self

    def __exit__(self, *exception: object) -> None:
        processes = [replica.process for replica in self.replicas if replica.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()

    async def answer(self, request: Forwarded) -> AsyncIterator[Message]:
        """The answer of the replica that has read the prompt, or of another one if that cannot be reached."""
        self._revive()
        own_path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if own_path == "/metrics" and request.scope["method"] == "GET":
            for message in await self._metrics(request):
                yield message
            return
        by_name = {replica.name: replica for replica in self.replicas if replica.alive}
        for name in self._affinity.ranked(request.prompt, {name: one.active for name, one in by_name.items()}):
            replica = by_name[name]
            try:
                reader, writer = await asyncio.open_unix_connection(replica.path)
            except OSError:  # it has just ended, or does not listen yet
                continue
            self._affinity.note(request.prompt, name)
            replica.active += 1
            try:
                async for message in send_on(request, reader, writer):
                    yield message
            finally:
                replica.active -= 1
            return
        raise Refusal(503, "no replica answers at the moment", code="busy", retry_after=1)

    async def _metrics(self, request: Forwarded) -> list[Message]:
        """The metrics of all replicas, with the replica's number as a label."""
        merged: dict[str, Metric] = {}
        messages: list[Message] = []
        for replica in self.replicas:
            try:
                reader, writer = await asyncio.open_unix_connection(replica.path)
            except OSError:
                continue
            messages = [message async for message in send_on(request, reader, writer)]
            if messages[0]["status"] != 200:
                return messages  # the key is missing, for example
            text = b"".join(message.get("body", b"") for message in messages).decode()
            for family in text_string_to_metric_families(text):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, "replica": replica.name}, sample.value)
        if not messages:
            raise Refusal(503, "no replica answers at the moment", code="busy", retry_after=1)
        body = generate_latest(_Collected(list(merged.values())))
        headers = [pair for pair in messages[0]["headers"] if pair[0] != b"content-length"]
        return [{**messages[0], "headers": headers}, {"type": "http.response.body", "body": body}]

    def _revive(self) -> None:
        """Starts replicas again that have ended."""
        for replica in self.replicas:
            if not replica.alive and time.monotonic() - replica.started > PAUSE:
                code = replica.process.exitcode if replica.process else None
                logger.error("a replica ended and is started again", extra={"replica": replica.name, "code": code})
                self._affinity.forget(replica.name)
                self._start(replica)

    def _start(self, replica: Replica) -> None:
        stored = str(Path(self._folder.name) / "responses.sqlite")
        arguments = (self._target, replica.cores, replica.path, stored, *self._arguments)
        # A fresh interpreter: threads and an event loop do not survive a fork.
        replica.process = multiprocessing.get_context("spawn").Process(target=_run, args=arguments, daemon=True)
        replica.started = time.monotonic()
        replica.process.start()


class _Collected(Collector):
    """Metrics that are there already, in the form that `generate_latest` takes."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use, neighbours together."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares_of(cores: list[int], count: int) -> list[set[int]]:
    """The cores of each of `count` replicas: neighbours, at least one each, and all of them used."""
    bounds = [len(cores) * number // count for number in range(count + 1)]
    return [
        set(cores[bounds[number] : bounds[number + 1]]) or {cores[bounds[number] % len(cores)]}
        for number in range(count)
    ]


def _run(target: Target, cores: set[int], path: str, stored: str, *arguments: Any) -> None:
    """The beginning of a replica's process."""
    os.setsid()  # Ctrl-C in the terminal is for the front, which ends the replicas once they have finished
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ.pop("NOTIFY_SOCKET", None)  # the front tells the service manager
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target(path, stored, *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
