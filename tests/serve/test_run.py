"""The socket that the server listens at, and what it does between requests."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest
import uvicorn

from mnemos.engine.engine import InferenceEngine
from mnemos.serve import run
from mnemos.serve.application import app
from mnemos.serve.run import Server, listen
from mnemos.serve.settings import Settings
from tests.engine.toys import ToyModel


def test_a_token_does_not_wait_for_the_acknowledgement_of_the_one_before_it() -> None:
    async def option() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected = writer.get_extra_info("socket")
            found.set_result(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(Settings(port=0))
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            await asyncio.wait_for(found, 5)
            writer.close()
        return found.result()

    assert asyncio.run(option()) != 0


def test_an_idle_server_sleeps_and_still_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TICK", 60.0)
    ticks, started = [], threading.Event()

    class Counted(Server):
        async def on_tick(self, counter: int) -> bool:
            ticks.append(counter)
            return await super().on_tick(counter)

    with InferenceEngine(ToyModel()) as engine:
        application = app(engine)
        server = Counted(uvicorn.Config(application, log_config=None), application, started.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listen(Settings(port=0))])))
        thread.start()
        assert started.wait(20)
        time.sleep(0.35)
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
    assert len(ticks) == 2  # at the start and at the end
