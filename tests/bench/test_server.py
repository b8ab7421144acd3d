"""The benchmark's client against a server, and the figures of a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from mnemos.bench import server
from mnemos.bench.server import Streamed, measure_server, stream_all
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import MnemosError
from mnemos.serve.application import app
from tests.engine.toys import ToyModel
from tests.serve.running import running


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with InferenceEngine(ToyModel(context_length=512)) as engine, running(app(engine, name="toy")) as client:
        yield str(client.base_url)


def test_streams_are_read_to_their_ends(address: str) -> None:
    bodies = [{"model": "toy", "prompt": [1, 2, 3], "max_tokens": 4 + n, "ignore_eos": True} for n in range(3)]
    streamed = stream_all(address, bodies)
    assert streamed.tokens == 4 + 5 + 6
    assert 0 < streamed.first[0] <= streamed.first[-1] <= streamed.seconds
    assert streamed.rate == pytest.approx(15 / streamed.seconds)


def test_a_refusal_is_shown(address: str) -> None:
    with pytest.raises(MnemosError, match="ended without its number of tokens.*does not exist"):
        stream_all(address, [{"model": "other", "prompt": [1]}])


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(MnemosError, match="did not start: .*no-such"), server.served(str(tmp_path / "no-such.gguf")):
        pass


@pytest.mark.slow
def test_all_figures_of_a_server(monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    monkeypatch.setattr(server, "STREAMS", (1, 2))
    monkeypatch.setattr(server, "ROUNDS", {1: 1, 2: 1})
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(server, "TOKENS", 16)
    figures = {result.metric: result for result in measure_server(smollm2, "auto")}
    assert list(figures) == ["ready_after", "memory_added", "idle", "stream1", "ttft_added", "stream2"]
    assert figures["stream1"].value > 0 and figures["stream2"].share is not None
    assert Streamed(2.0, [0.5], 8).rate == 4
